"""Rows of a data file, as they are written there: no type inference, no cache directory, nothing downloaded."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

Row = dict[str, Any]


def load_rows(path: str) -> datasets.Dataset | list[Row]:
    """Rows of a data file or directory, in their order there.

    JSON, CSV and Parquet are read directly and not through `datasets.load_dataset`, which guesses one type per column
    (a CSV label "007" becomes 7) and writes a cache that several ranks then share. CSV values stay strings.

    Args:
        path: a .jsonl (one object a line), .json (a list of objects), .csv (with a header) or .parquet file, or a
            directory written by `datasets.Dataset.save_to_disk`.
    Returns:
        One mapping per row. Blank lines of a .jsonl file are not rows.
    Raises:
        ValueError: nothing at `path`, a kind of file that is not read, a broken file (with its line), or no rows.
    """
    source = Path(path)
    if source.is_dir():
        rows = _read_directory(source)
    elif not source.is_file():
        raise ValueError(f"data path={path} does not exist: give a .jsonl, .json, .csv or .parquet file or a directory")
    elif source.suffix not in _READERS:
        raise ValueError(f"data path={path}; a file ends in {', '.join(_READERS)}, not {source.suffix!r}: convert it")
    else:
        rows = _READERS[source.suffix](source)
    if len(rows) == 0:
        raise ValueError(f"data path={path} has no rows: nothing to train or evaluate on")
    return rows


def _read_directory(path: Path) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"data path={path} is not a directory that datasets' save_to_disk wrote: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        choices = ", ".join(str(path / split) for split in loaded)
        raise ValueError(f"data path={path} holds several splits; one is read at a time: use one of {choices}")
    return loaded


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(_as_row(json.loads(line), path=path, place=f"line {number}"))
                except json.JSONDecodeError as error:
                    raise ValueError(f"data path={path}, line {number} is not JSON: {error}") from error
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"data path={path} is not JSON: {error}; one object a line is a .jsonl file") from error
    if not isinstance(values, list):
        raise ValueError(f"data path={path} holds a {type(values).__name__}, not a list of objects")
    return [_as_row(value, path=path, place=f"entry {index}") for index, value in enumerate(values)]


def _as_row(value: object, *, path: Path, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"data path={path}, {place} is a {type(value).__name__}, not an object with named fields")
    return value


def _read_csv(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or ())
                    raise ValueError(
                        f"data path={path}, line {reader.line_num}: the header has {columns} columns, not this line"
                    )
                rows.append(dict(row))
        except csv.Error as error:
            raise ValueError(f"data path={path}, line {reader.line_num} is not CSV: {error}") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data path={path} is not a Parquet file: {error}") from error
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
