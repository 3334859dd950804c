"""What a supervised run trains on: rows in tokens, on disk once for all ranks of a machine."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megarlhf.data.token_ids import fingerprint
from megarlhf.data.types import TrainingRows

_ARRAYS = ("input_ids", "lengths", "prompt_lengths", "unit_ids")
# What another model computes of the same rows; a checkpoint does not ask for the same.
_COMPUTED = ("field.ref_log_probs", "field.teacher_ids", "field.teacher_log_probs")


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


def too_long(max_len: int) -> str:
    """The cause of rows that are dropped for their length."""
    return f"longer than max_len={max_len}"


def dropped_line(data: SupervisedData) -> str:
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
