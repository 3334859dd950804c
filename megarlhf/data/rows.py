"""Rows of a data file: where each lies, what is wrong with them, and their values as plain JSON."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

import numpy as np

from megarlhf.data.types import Ints

Row = dict[str, Any]
T = TypeVar("T")

_SHOWN_ERRORS = 5


class RowErrors:
    """What is wrong with rows of one file: the first few in words, the others as a number."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._shown: list[str] = []
        self._more = 0

    def add(self, sentence: str) -> None:
        """Note what is wrong with a row, which the sentence names."""
        if len(self._shown) < _SHOWN_ERRORS:
            self._shown.append(sentence)
        else:
            self._more += 1

    def raise_if_any(self) -> None:
        """Raise ValueError with one line for each of the first problems, and the number of the others."""
        rest = [f"{self._path}: {self._more} more rows cannot be used either"] if self._more else []
        if self._shown:
            raise ValueError("\n".join(self._shown + rest))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one data file in their order, or rows that were taken from several."""

    path: str
    rows: list[Row]
    columns: tuple[str, ...] | None = None  # names in the header or schema; None where each row has names of its own
    lines: list[int] | None = None  # line of each row, counted from 1; None where the kind of file has none
    parts: tuple["Rows", ...] = ()  # what the rows were taken from; none where they are a file's
    origins: Ints | None = None  # [n, 2] part, and index there, of each row

    @classmethod
    def joined(cls, path: str, parts: Sequence["Rows"], part_ids: Ints, indices: Ints) -> "Rows":
        """Rows of several files: row i is the one of `indices[i]` in `parts[part_ids[i]]`."""
        origins = np.stack([part_ids, indices], axis=1).astype(np.int64)
        rows = [parts[part].rows[index] for part, index in origins.tolist()]
        return cls(path=path, rows=rows, parts=tuple(parts), origins=origins)

    def take(self, indices: Ints) -> "Rows":
        """The rows of these indices, in their order."""
        return Rows.joined(self.path, [self], np.zeros_like(indices), indices)

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """Where a row is, for a message."""
        if self.origins is not None:
            part, origin = self._origin(index)
            return part.place(origin)
        line = "" if self.lines is None else f" (line {self.lines[index]})"
        return f"row {index}{line} of {self.path}"

    def _origin(self, index: int) -> tuple["Rows", int]:
        assert self.origins is not None
        part, origin = self.origins[index]
        return self.parts[part], int(origin)

    def names(self, index: int) -> tuple[str, ...]:
        """Names of a row's columns, also of those that were not read where the file has a header or schema."""
        if self.origins is None:
            return self.columns or tuple(self.rows[index])
        part, origin = self._origin(index)
        return part.names(origin)

    def collect(self, function: Callable[[int], T]) -> list[T]:
        """`function` of each row's index.

        Raises:
            ValueError: the function raised one; those of all rows come together, with the rows' places.
        """
        results, errors = [], RowErrors(self.path)
        for index in range(len(self.rows)):
            try:
                results.append(function(index))
            except (ValueError, RecursionError) as error:
                errors.add(f"{self.place(index)}: {error}")
        errors.raise_if_any()
        return results

    def all_too_long(self, option: str, limit: int, *, shortest: int) -> ValueError:
        """The error where a limit of tokens leaves no row."""
        return ValueError(
            f"{option}={limit} drops all {len(self)} rows of {self.path}, the shortest of which has {shortest} tokens: "
            f"raise {option}"
        )

    def value(self, index: int, key: str, *, option: str) -> Any:
        """What a row has in a column that it must have, else ValueError; `option` is the setting that holds `key`."""
        row = self.rows[index]
        if key not in row:
            keys = ", ".join(map(repr, self.names(index))) or "none, for the row is empty"
            raise ValueError(f"{option}={key} is not there; the keys are {keys}: set {option}")
        if row[key] is None:
            raise ValueError(f"{option}={key} has no value: remove the row")
        return row[key]


def json_value(value: object) -> Any:
    """A value of a data file as JSON has it: null, true, number, string, list or object.

    NaN is no value, at any depth. Decimals, dates, times and UUIDs, which Parquet and Arrow have, become strings.

    Raises:
        ValueError: bytes, durations, infinities, a key that is no string, or text with half of a surrogate pair.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        check_text(value)
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"it holds {value}, which JSON has no form for: remove it or write it as text")
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        others = [key for key in value if not isinstance(key, str)]
        if others:
            raise ValueError(f"it holds an object with the key {others[0]!r}; keys are strings: rename it")
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, date | time | Decimal | UUID):
        return str(value)
    raise ValueError(f"it holds a {type(value).__name__}, which JSON has no form for: write it as text or numbers")


def check_text(text: str) -> None:
    r"""Refuse half of a surrogate pair: legal in JSON as \ud83d, but no character, so no tokenizer takes it.

    Raises:
        ValueError: the text holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 20) : error.end])
        raise ValueError(
            f"its text holds {ascii(text[error.start])}, half of a surrogate pair, after {near} (a text that was cut "
            "inside a character): repair it or remove the row"
        ) from error
