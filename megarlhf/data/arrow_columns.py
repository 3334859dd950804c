"""Columns of Arrow tables, which Parquet files and saved datasets hold, as plain Python values."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow

from megarlhf.data.rows import Row, RowErrors, Rows
from megarlhf.formats.json_files import one_line


def rows_of_table(path: str, table: pyarrow.Table, *, columns: Sequence[str]) -> Rows:
    """Rows of an Arrow table.

    Fields of structs without a value are left out, at any depth: Arrow gives every struct all fields that any has, as
    chats and labels of JSON have not. So a null that was written into a struct is lost. Columns of `pyarrow.json_` (the
    Json feature of datasets) are decoded and keep theirs.

    Args:
        path: of the file, for messages.
        columns: names of all columns of the file; the table may hold some of them only.
    Raises:
        ValueError: a name that several columns have, or values that are not what their type says.
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
