"""Rows of a data file, as they are written there: no type inference, no cache directory, nothing downloaded."""

import codecs
import csv
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from megarlhf.data.arrow_columns import rows_of_table
from megarlhf.data.rows import Row, RowErrors, Rows


def load_rows(path: str, *, columns: Sequence[str] | None = None, limit: int | None = None) -> Rows:
    """Rows of a data file or directory, in their order there.

    JSON, CSV and Parquet are read directly and not through `datasets.load_dataset`, which guesses one type per column
    (a CSV label "007" becomes 7) and writes a cache that several ranks then share. CSV values stay strings.

    Args:
        path: a .jsonl (one object a line), .json (a list of objects), .csv (with a header) or .parquet file, or a
            directory written by `datasets.Dataset.save_to_disk`. The case of the suffix does not matter.
        columns: those that are needed; others need not be read. None reads all.
        limit: read only the first so many rows; None reads all.
    Returns:
        One mapping per row. Blank lines of .jsonl and .csv files are not rows.
    Raises:
        ValueError: a kind of file that is not read, a broken file (with its line), or no rows.
    """
    source = Path(path)
    suffix = source.suffix.lower()
    if source.is_dir():
        rows = _read_directory(source, columns, limit)
    elif suffix not in _READERS:
        raise ValueError(f"data path={path}; a file ends in {', '.join(_READERS)}, not {source.suffix!r}: convert it")
    else:
        try:
            rows = _READERS[suffix](source, columns, limit)
        except OSError as error:
            raise ValueError(f"data path={path} cannot be read ({error}): give a readable file") from error
    if len(rows) == 0:
        raise ValueError(f"data path={path} has no rows: nothing to train or evaluate on")
    return rows


def _read_directory(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    try:
        loaded = datasets.load_from_disk(str(path))
    # Whatever json, datasets and pyarrow raise for files that are missing or broken.
    except Exception as error:
        raise ValueError(f"data path={path} is not a directory that datasets' save_to_disk wrote: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        choices = ", ".join(str(path / split) for split in loaded)
        raise ValueError(f"data path={path} holds several splits; one is read at a time: use one of {choices}")
    names = [name for name in loaded.column_names if columns is None or name in columns]
    table = loaded.with_format("arrow", columns=names)[: len(loaded) if limit is None else limit]
    return rows_of_table(str(path), table, columns=loaded.column_names)


def _read_jsonl(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    rows: list[Row] = []
    lines: list[int] = []
    errors = RowErrors(str(path))
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            if limit is not None and len(lines) == limit:
                break
            lines.append(number)
            try:
                rows.append(_as_row(_parse(text)))
            except ValueError as error:
                errors.add(f"data path={path}, line {number} {error}")
    errors.raise_if_any()
    return Rows(path=str(path), rows=rows, lines=lines)


def _read_json(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    try:
        values = _parse(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise ValueError(f"data path={path} {error}; one object a line is a .jsonl file") from error
    if not isinstance(values, list):
        raise ValueError(f"data path={path} holds a {type(values).__name__}, not a list of objects")
    rows: list[Row] = []
    errors = RowErrors(str(path))
    for index, value in enumerate(values[:limit]):
        try:
            rows.append(_as_row(value))
        except ValueError as error:
            errors.add(f"data path={path}, entry {index} {error}")
    errors.raise_if_any()
    return Rows(path=str(path), rows=rows)


def _parse(text: bytes) -> object:
    """A JSON value, or ValueError with a predicate that goes on from its place."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:  # also numbers of more than 4,300 digits, and thousands of brackets
        raise ValueError(f"is not JSON: {error}") from error


def _as_row(value: object) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}, not an object with named fields")
    return value


def _read_csv(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    csv.field_size_limit(sys.maxsize)  # a guard against a missing quote that long documents exceed
    rows: list[Row] = []
    lines: list[int] = []
    errors = RowErrors(str(path))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or ()
            for name in names if columns is None else columns:
                if names.count(name) > 1:
                    raise ValueError(f"data path={path} has several columns named {name!r}: rename all but one")
            for row in itertools.islice(reader, limit):
                lines.append(reader.line_num)
                rows.append(dict(row))
                if None in row or None in row.values():
                    place = f"data path={path}, line {reader.line_num}"
                    errors.add(f"{place}: the header has {len(names)} columns, not this line")
        except csv.Error as error:
            raise ValueError(f"data path={path}, line {reader.line_num} is not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data path={path} is not UTF-8 text ({error.reason}, after line {reader.line_num}): save it as UTF-8"
            ) from error
    errors.raise_if_any()
    return Rows(path=str(path), rows=rows, columns=tuple(names), lines=lines)


def _read_parquet(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        table = file.read(columns=names).slice(0, limit)
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"data path={path} is not a Parquet file: {error}") from error
    return rows_of_table(str(path), table, columns=file.schema_arrow.names)


_READERS: dict[str, Callable[[Path, Sequence[str] | None, int | None], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
