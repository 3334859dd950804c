"""Rows of data sets: files, directories of them, splits, several data sets mixed. Nothing is downloaded."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np

from megarlhf.data.readers import FILE_KINDS, read_file, read_saved
from megarlhf.data.rows import Row, Rows
from megarlhf.formats.data_names import SUFFIXES, DataName, data_names

logger = logging.getLogger(__name__)

# What Hugging Face's own directories call their splits, as words of a file's or folder's name.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # train_sft-00000-of-00003.parquet
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Which rows of which data sets.

    Attributes:
        names: a file, a directory, `type@directory`, or a comma list of these.
        probs: of each data set, by which rows are drawn from them in turn until one of them has no more, as
            `datasets.interleave_datasets` does it; None takes all rows, one data set behind the other.
        split: of each data set; one without splits is its own "train". None: the only one that there is.
        held_out: this part of each data set is for evaluation, by content: rows that are equal stay together, also
            those of several data sets.
        is_held_out: take that part, and not the rest.
        seed: of what is drawn and held out.
    """

    names: str
    probs: tuple[float, ...] | None = None
    split: str | None = None
    held_out: float = 0.0
    is_held_out: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return self.names


def load_rows(source: str | DataSource, *, columns: Sequence[str] | None = None, limit: int | None = None) -> Rows:
    """Rows of a file, a directory or several of them, in their order there.

    Args:
        source: .jsonl (one object a line), .json (a list of objects, or as .jsonl), .csv (with a header), .parquet or
            .arrow files; directories of such files, all of one kind or chosen by `type@directory`; directories written
            by `save_to_disk` of a `datasets.Dataset` or `DatasetDict`. The case of a suffix does not matter.
        columns: those that are needed; others need not be read. None reads all.
        limit: read only the first so many rows of each data set, and no more of their mixture; None reads all.
    Returns:
        One mapping per row. Blank lines of .jsonl and .csv files are not rows.
    Raises:
        ValueError: a kind of file that is not read, a broken file (with its line), a split that is not there, or no
            rows.
    """
    whole = DataSource(names=source) if isinstance(source, str) else source
    parts: list[Rows] = []
    errors: list[str] = []
    for name in data_names(whole.names):
        try:
            parts.append(_load_split(name, whole.split, columns, limit))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    if whole.held_out:
        parts = _divided(parts, whole, columns)
    if whole.probs is None or len(parts) == 1:
        return _first(_one_behind_the_other(whole.names, parts), limit)
    return _first(_mixed(whole.names, parts, whole.probs, whole.seed), limit)


def _first(rows: Rows, limit: int | None) -> Rows:
    return rows if limit is None or len(rows) <= limit else rows.take(np.arange(limit))


def _one_behind_the_other(path: str, parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    sizes = [len(part) for part in parts]
    indices = np.concatenate([np.arange(size) for size in sizes])
    return Rows.joined(path, parts, np.repeat(np.arange(len(parts)), sizes), indices)


def _mixed(path: str, parts: Sequence[Rows], probs: Sequence[float], seed: int) -> Rows:
    """Rows drawn from the data sets by their probabilities, each in its order, until the first has no more."""
    sizes = [len(part) for part in parts]
    ends = np.cumsum(sizes)
    starts = ends - np.asarray(sizes)
    numbers = [datasets.Dataset.from_dict({"row": range(start, end)}) for start, end in zip(starts, ends, strict=True)]
    drawn = datasets.interleave_datasets(
        numbers, probabilities=list(probs), seed=seed, stopping_strategy="first_exhausted"
    )
    order = np.asarray(drawn.with_format("numpy")["row"][:], dtype=np.int64)
    part_ids = np.searchsorted(ends, order, side="right")
    counts = np.bincount(part_ids, minlength=len(parts)).tolist()
    told = [f"{count} of {len(part)} rows of {part.path}" for count, part in zip(counts, parts, strict=True)]
    logger.warning("one data set has no more rows: %s are used", ", ".join(told))
    return Rows.joined(path, parts, part_ids, order - starts[part_ids])


def _divided(parts: Sequence[Rows], source: DataSource, columns: Sequence[str] | None) -> list[Rows]:
    """The part of each data set that is held out, or the rest of it; equal rows are on one side in all of them."""
    contents = [[_content(row, columns) for row in part.rows] for part in parts]
    chosen: set[bytes] = set()
    for each in contents:
        distinct = list(dict.fromkeys(each))
        order = np.random.default_rng(source.seed).permutation(len(distinct))
        chosen.update(distinct[index] for index in order[: max(1, round(source.held_out * len(distinct)))])
    divided = []
    for part, each in zip(parts, contents, strict=True):
        sides = np.array([content in chosen for content in each])
        if sides.all():
            number = len(set(each))
            raise ValueError(
                f"data path={part.path} has {number} different rows, of which {number} are held out "
                f"(eval_split={source.held_out:g}) and none is left to train on: use more data, or eval_dataset"
            )
        divided.append(part.take(np.flatnonzero(sides == source.is_held_out)))
    return divided


def _content(row: Row, columns: Sequence[str] | None) -> bytes:
    text = json.dumps({key: row.get(key) for key in columns or row}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _load_split(name: DataName, split: str | None, columns: Sequence[str] | None, limit: int | None) -> Rows:
    """Rows of one data set; `split` as for DataSource."""
    readers = _splits(name)
    wanted = split if split in readers else _SPLITS.get(split or "", split)
    if wanted is None and len(readers) == 1:
        (wanted,) = readers
    if wanted not in readers:
        asked = "one is read at a time" if split is None else f"not {split}"
        raise ValueError(
            f"data path={name.path} holds the splits {', '.join(readers)}; {asked}: name one of them in train_split, "
            "eval_split or prompt_split, or give the path of its files alone; eval_split=0.03 takes that part of the "
            "training data out"
        )
    rows = readers[wanted](columns, limit)
    if len(rows) == 0:
        raise ValueError(f"data path={name.path} has no rows: nothing to train or evaluate on")
    return rows


_Reader = Callable[[Sequence[str] | None, int | None], Rows]


def _splits(name: DataName) -> dict[str, _Reader]:
    """What reads each split of a data set; one that says nothing of splits is all `train`."""
    path = Path(name.path)
    if not path.is_dir():
        return {"train": partial(read_file, path)}
    if name.kind is None and (path / "dataset_dict.json").exists():
        return {split: partial(read_saved, path / split) for split in _saved_splits(path)}
    if name.kind is None and ((path / "state.json").exists() or (path / "dataset_info.json").exists()):
        return {"train": partial(read_saved, path)}
    files = _files_by_split(path, name.kind)
    return {split: partial(_read_files, name.path, paths) for split, paths in files.items()}


def _saved_splits(path: Path) -> list[str]:
    try:
        found = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return [str(split) for split in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data path={path} is not a directory that datasets' save_to_disk wrote: {error}") from error


def _read_files(name: str, paths: Sequence[Path], columns: Sequence[str] | None, limit: int | None) -> Rows:
    parts: list[Rows] = []
    for path in paths:
        left = None if limit is None else limit - sum(map(len, parts))
        if left == 0:
            break
        parts.append(read_file(path, columns, left))
    return _one_behind_the_other(name, parts)


def _files_by_split(directory: Path, kind: str | None) -> dict[str, list[Path]]:
    """Files of a directory, at any depth, by the split that they are of, in the order of their names."""
    suffixes = FILE_KINDS if kind is None else SUFFIXES[kind]
    paths = [
        path
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in suffixes
        and path.name not in _METADATA
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    kinds = sorted({path.suffix.lower() for path in paths})
    if not paths:
        raise ValueError(
            f"data path={directory} holds no {', '.join(suffixes)} files and is not a directory that datasets' "
            "save_to_disk wrote: give one with data"
        )
    if kind is None and len(kinds) > 1:
        raise ValueError(
            f"data path={directory} holds {' and '.join(kinds)} files, perhaps of the same rows: choose a kind, as "
            f"{next(key for key, names in SUFFIXES.items() if kinds[0] in names)}@{directory}"
        )
    splits = {path: _split_of(path.relative_to(directory)) for path in paths}
    if not any(splits.values()):
        return {"train": paths}
    unnamed = [str(path) for path, split in splits.items() if split is None]
    if unnamed:
        raise ValueError(
            f"data path={directory}; the name of {unnamed[0]} says no split (train, validation, test), as those of "
            f"{len(paths) - len(unnamed)} other files do: rename it, or give the files by their own path"
        )
    found: dict[str, list[Path]] = {}
    for path, split in splits.items():
        found.setdefault(str(split), []).append(path)
    return found


def _split_of(path: Path) -> str | None:
    """The split that a file's name, or that of a folder above it, speaks of."""
    if shard := _SHARD.fullmatch(path.stem):
        return _SPLITS.get(shard[1], shard[1])
    for name in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split("[^a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None
