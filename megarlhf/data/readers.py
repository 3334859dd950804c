"""Rows of one data file, as they are written there: no type inference, no cache directory."""

import codecs
import csv
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from megarlhf.data.rows import Row, RowErrors, Rows
from megarlhf.formats.json_files import as_object, json_lines, json_row, one_line, parse_json

_ARROW_FILE = b"ARROW1"


def read_file(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    """Rows of one file, in their order there; `columns` and `limit` as for `load_rows`.

    JSON, CSV and Parquet are read directly and not through `datasets.load_dataset`, which guesses one type per column
    (a CSV label "007" becomes 7) and writes a cache that several ranks then share. CSV values stay strings.

    Raises:
        ValueError: a kind of file that is not read, or a broken file (with its line).
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"data path={path}; a file ends in {', '.join(_READERS)}, not {path.suffix!r}: convert it")
    try:
        return _READERS[suffix](path, columns, limit)
    except OSError as error:
        raise ValueError(f"data path={path} cannot be read ({error}): give a readable file") from error


def read_saved(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    """Rows of a directory that `datasets.Dataset.save_to_disk` wrote, as `read_file`."""
    try:
        loaded = datasets.load_from_disk(str(path))
    # Whatever json, datasets and pyarrow raise for files that are missing or broken.
    except Exception as error:
        raise ValueError(f"data path={path} is not a directory that datasets' save_to_disk wrote: {error}") from error
    assert isinstance(loaded, datasets.Dataset), "a DatasetDict's splits are read one by one"
    names = [name for name in loaded.column_names if columns is None or name in columns]
    table = loaded.with_format("arrow", columns=names)[: len(loaded) if limit is None else limit]
    return _rows_of_table(str(path), table, loaded.column_names)


def _read_jsonl(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    rows: list[Row] = []
    lines: list[int] = []
    errors = RowErrors(str(path))
    for number, line in itertools.islice(json_lines(path), limit):
        lines.append(number)
        try:
            rows.append(json_row(line))
        except ValueError as error:
            errors.add(f"data path={path}, line {number}: {error}")
    errors.raise_if_any()
    return Rows(path=str(path), rows=rows, lines=lines)


def _read_json(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    try:
        values = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        cause = error.__cause__
        if (
            isinstance(cause, json.JSONDecodeError)
            and cause.msg == "Extra data"
            and "\n" not in cause.doc[: cause.pos].strip()
        ):
            return _read_jsonl(path, columns, limit)
        raise ValueError(f"data path={path}: {error}") from error
    if not isinstance(values, list):
        raise ValueError(f"data path={path} holds a {type(values).__name__}, not a list of objects")
    rows: list[Row] = []
    errors = RowErrors(str(path))
    for index, value in enumerate(values[:limit]):
        try:
            rows.append(as_object(value))
        except ValueError as error:
            errors.add(f"data path={path}, entry {index}: {error}")
    errors.raise_if_any()
    return Rows(path=str(path), rows=rows)


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
    return _rows_of_table(str(path), table, file.schema_arrow.names)


def _read_arrow(path: Path, columns: Sequence[str] | None, limit: int | None) -> Rows:
    """Arrow IPC, as a stream (which datasets caches and saves) or as a file."""
    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
            source.seek(0)
            table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source).read_all()
    except pyarrow.ArrowException as error:
        raise ValueError(f"data path={path} is not an Arrow file: {error}") from error
    names = [name for name in table.column_names if columns is None or name in columns]
    return _rows_of_table(str(path), table.select(names).slice(0, limit), table.column_names)


def _rows_of_table(path: str, table: pyarrow.Table, columns: Sequence[str]) -> Rows:
    """Rows of an Arrow table, which may hold some of the file's columns only.

    Fields of structs without a value are left out, at any depth: Arrow gives every struct all fields that any has, as
    chats and labels of JSON have not. So a null that was written into a struct is lost. Columns of `pyarrow.json_` (the
    Json feature of datasets) are decoded and keep theirs.
    """
    values = [_column(path, table, name) for name in table.column_names]
    rows: list[Row] = [dict(zip(table.column_names, row, strict=True)) for row in zip(*values, strict=True)]
    return Rows(path=path, rows=rows or [{} for _ in range(table.num_rows)], columns=tuple(columns))


def _column(path: str, table: pyarrow.Table, name: str) -> list[Any]:
    if table.column_names.count(name) > 1:
        raise ValueError(f"data path={path} has several columns named {name!r}: rename or remove all but one")
    column = table.column(name)
    try:
        return [_plain(value, column.type) for value in column.to_pylist(maps_as_pydicts="strict")]
    # Text that is not UTF-8, dates past the year 9999, maps with a key twice: many kinds of error, none with a row.
    except Exception as error:
        errors = RowErrors(path)
        for index, scalar in enumerate(column):
            try:
                _plain(scalar.as_py(maps_as_pydicts="strict"), column.type)
            except Exception as wrong:
                errors.add(f"row {index} of {path}: column {name!r} cannot be read ({one_line(wrong)})")
        errors.raise_if_any()
        raise ValueError(f"data path={path}: column {name!r} cannot be read ({one_line(error)})") from error


def _plain(value: Any, kind: pyarrow.DataType) -> Any:
    """A value of an Arrow type without the nulls of absent fields, and with its JSON decoded."""
    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if pyarrow.types.is_struct(kind):
        fields = {field.name: _plain(value[field.name], field.type) for field in kind}
        return {name: field for name, field in fields.items() if field is not None}
    if pyarrow.types.is_map(kind):
        return {key: _plain(item, kind.item_type) for key, item in value.items()}
    # Lists of text and numbers are plain already; value_type is what kinds of list have in common.
    if isinstance(value, list) and pyarrow.types.is_nested(kind):
        if pyarrow.types.is_nested(kind.value_type) or isinstance(kind.value_type, pyarrow.JsonType):
            return [_plain(item, kind.value_type) for item in value]
    return value


_READERS: dict[str, Callable[[Path, Sequence[str] | None, int | None], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
FILE_KINDS = tuple(_READERS)
