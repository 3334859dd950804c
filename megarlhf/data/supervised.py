"""What a supervised run trains on: rows in tokens, on disk once for all ranks of a machine."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megarlhf.data.token_ids import fingerprint
from megarlhf.data.types import Ints, TrainingRows, starts_of

_ARRAYS = ("input_ids", "lengths", "prompt_lengths", "unit_ids")
# What another model computes of the same rows; a checkpoint does not ask for the same.
_COMPUTED = ("field.ref_log_probs", "field.teacher_top_k")


class Units(Protocol):
    """Units of rows that the supervised loop draws from: all in memory, or read step by step."""

    @property
    def shuffles(self) -> bool:
        """Whether an epoch draws its units in an order of its own; else they come as they are, and count on."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Cause -> rows that were left out for it."""

    @property
    def num_units(self) -> int:
        """Units of an epoch."""

    @property
    def fingerprint(self) -> str:
        """Hex fingerprint of what is drawn; equal on every machine."""

    def __len__(self) -> int: ...

    def of_units(self, units: Sequence[int] | Ints) -> tuple["SupervisedData", Ints]:
        """Data that holds the rows of these units, and the indices of their rows in it, unit by unit."""

    def save(self, directory: Path) -> None:
        """Write it into a directory, which is made, for other processes to open."""


@dataclass(frozen=True, kw_only=True)
class SupervisedData:
    """Rows that are trained on, and how many were left out.

    Attributes:
        rows: their units are numbered 0, 1, ... in order; the rows of a unit follow each other.
        dropped: cause -> rows of the file that were left out for it.
        unmatched: the prompts of `rows` with other rows' answers, one for each row; None where no loss asks for them.
    """

    rows: TrainingRows
    dropped: Mapping[str, int] = field(default_factory=dict)
    unmatched: TrainingRows | None = None

    shuffles = True

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_units(self) -> int:
        """Units of an epoch."""
        return self.rows.num_units

    def of_units(self, units: Sequence[int] | Ints) -> tuple["SupervisedData", Ints]:
        """Where the rows of units are: all of this data is there, and indices of theirs."""
        return self, self.rows.of_units(units)

    @cached_property
    def fingerprint(self) -> str:
        """Hex fingerprint of all rows in their order; equal on every machine."""
        rows = self.rows
        digest = fingerprint(rows.input_ids, np.cumsum(rows.lengths), rows.prompt_lengths.tolist())
        arrays = {name: values for name, values in _arrays(rows).items() if name not in _COMPUTED}
        more = {name: values for name, values in arrays.items() if name not in _ARRAYS or name == "unit_ids"}
        whole = hashlib.blake2b(digest.encode(), digest_size=16)
        for name, values in sorted(more.items()):
            whole.update(name.encode() + values.tobytes())
        return whole.hexdigest()

    def save(self, directory: Path) -> None:
        """Write everything as .npy files into a directory, which is made, for `open`."""
        directory.mkdir()
        (directory / "dropped.json").write_text(json.dumps(dict(self.dropped)))
        _save(self.rows, directory / "rows")
        if self.unmatched is not None:
            _save(self.unmatched, directory / "unmatched")

    @classmethod
    def open(cls, directory: Path) -> Self:
        """What `save` has written; the arrays are the files themselves, read-only, once for all processes."""
        unmatched = directory / "unmatched"
        return cls(
            rows=_open(directory / "rows"),
            dropped=json.loads((directory / "dropped.json").read_text()),
            unmatched=_open(unmatched) if unmatched.is_dir() else None,
        )


def rows_in_both(training: TrainingRows, evaluation: TrainingRows) -> int:
    """Units of the evaluation that are trained on too, token for token: what they show is memory."""
    trained = set(_unit_digests(training))
    return sum(unit in trained for unit in _unit_digests(evaluation))


def _unit_digests(rows: TrainingRows) -> list[bytes]:
    digests = [hashlib.blake2b(digest_size=16) for _ in range(rows.num_units)]
    for start, length, unit in zip(starts_of(rows.lengths), rows.lengths, rows.unit_ids, strict=True):
        ids = rows.input_ids[start : start + length].astype("<i4")
        digests[unit].update(length.tobytes() + ids.tobytes())
    return [digest.digest() for digest in digests]


def data_lines(data: SupervisedData, evaluation: SupervisedData | None) -> str:
    """What a run trains and evaluates on, in lines for its start log."""
    named = {"training": data} | ({} if evaluation is None else {"evaluation": evaluation})
    lines = [
        f"{name}: {_count(each)}, {int(each.rows.lengths.sum())} tokens, "
        f"{int(each.rows.num_loss_targets.sum())} of them with a loss; {dropped_line(each)}"
        for name, each in named.items()
    ]
    if evaluation is not None and (both := rows_in_both(data.rows, evaluation.rows)):
        lines.append(
            f"warning: {both} of {evaluation.num_units} evaluation rows are trained on too (the evaluation flatters): "
            "remove them from either"
        )
    return "\n".join(lines)


def _count(data: SupervisedData) -> str:
    """Rows of the data files, which may be several sequences each."""
    sequences = "" if data.num_units == len(data) else f" ({len(data)} sequences)"
    return f"{data.num_units} rows{sequences}"


def dropped_line(data: Units) -> str:
    """What was left out, in a line for the console."""
    causes = [f"{number} {cause}" for cause, number in data.dropped.items() if number]
    return f"{sum(data.dropped.values())} rows dropped" + (f": {', '.join(causes)}" if causes else "")


def _arrays(rows: TrainingRows) -> dict[str, NDArray[Any]]:
    """Every array by the name of its file."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(rows, name) for name in _ARRAYS}
    arrays |= {} if rows.loss_mask is None else {"loss_mask": rows.loss_mask}
    arrays |= {f"field.{name}": values for name, values in rows.fields.items()}
    return arrays | {f"scalar.{name}": values for name, values in rows.scalars.items()}


def _save(rows: TrainingRows, directory: Path) -> None:
    directory.mkdir()
    for name, values in _arrays(rows).items():
        np.save(directory / f"{name}.npy", values)


def _open(directory: Path) -> TrainingRows:
    arrays = {path.stem: np.load(path, mmap_mode="r").view(np.ndarray) for path in directory.glob("*.npy")}
    groups: dict[str, dict[str, NDArray[Any]]] = {"field": {}, "scalar": {}}
    for name in [name for name in arrays if "." in name]:
        kind, _, rest = name.partition(".")
        groups[kind][rest] = arrays.pop(name)
    return TrainingRows(**arrays, fields=groups["field"], scalars=groups["scalar"])
