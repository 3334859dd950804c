"""Rows come back as they were written, from every kind of file; broken files say where."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megarlhf.data.loading import load_rows

ROWS = [{"input": "a, b", "label": "007"}, {"input": 'line\n"two"', "label": "1"}]


def write(tmp_path: Path, kind: str) -> str:
    path = tmp_path / f"rows{kind}"
    if kind == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == ".csv":
        path.write_text('input,label\n"a, b",007\n"line\n""two""",1\n', encoding="utf-8")
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", "_directory"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    assert load_rows(path).rows == ROWS
    first = load_rows(path, columns=("label", "absent"), limit=1)
    assert (first.rows[0]["label"], len(first)) == ("007", 1)


def test_json_values_keep_their_own_types(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"label": 1}\n{"label": "x"}\n{"messages": [{"role": "user"}]}\n')
    assert load_rows(str(path)).rows == [{"label": 1}, {"label": "x"}, {"messages": [{"role": "user"}]}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is a list"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n{"a"\n', "(?s)line 3 is a list.*line 4 is not JSON"),
        ("a.jsonl", "[1]\n" * 8, "(?s)line 5 is a list.*a.jsonl: 3 more rows"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON: maximum recursion"),
        ("a.json", '[{"a": 1}, 2, 3]', "(?s)entry 1 is a int.*entry 2 is a int"),
        ("a.csv", "a,a\n1,2\n", "several columns named 'a'"),
        ("a.json", '{"a": 1}', "holds a dict, not a list"),
        ("a.json", '{"a": 1}\n{"a": 2}', "is a .jsonl file"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: the header has 2 columns"),
        ("a.csv", 'a,b\n1,"2\n', "is not CSV"),
        ("a.csv", "a,b\n", "no rows"),
        ("a.parquet", "x" * 20, "not a Parquet file"),
        ("a.txt", "x", "not '.txt'"),
    ],
)
def test_broken_file_is_refused_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


def test_missing_path_other_directory_and_several_splits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read .*No such file"):
        load_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="save_to_disk"):
        load_rows(str(tmp_path))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="splits/train"):
        load_rows(str(tmp_path / "splits"))
    assert len(load_rows(str(tmp_path / "splits" / "train"))) == 2


@pytest.mark.parametrize(
    ("name", "before", "where"),
    [
        ("a.jsonl", b'{"a": "x"}\n{"a": "', "line 2 is not UTF-8"),
        ("a.json", b'[{"a": "', "at byte 11"),
        ("a.csv", b"a\n", ""),
    ],
)
def test_text_in_another_encoding_is_refused_with_its_file(
    tmp_path: Path, name: str, before: bytes, where: str
) -> None:
    (tmp_path / name).write_bytes(before + "café".encode("latin-1") + b'"}\n')
    with pytest.raises(ValueError, match=f"data path={tmp_path / name}.*is not UTF-8.*save it as UTF-8") as caught:
        load_rows(str(tmp_path / name))
    assert where in str(caught.value)


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, a field past Python's default limit with line breaks in it, blank lines at the end."""
    path = tmp_path / "long.CSV"
    text = "a\r\n" + 'x"' * 100_000
    field = text.replace('"', '""')
    path.write_bytes(f'input,label\r\n"{field}",007\r\n\r\nb,\r\n\r\n\r\n'.encode("utf-8-sig"))
    rows = load_rows(str(path))
    assert rows.rows == [{"input": text, "label": "007"}, {"input": "b", "label": ""}]
    assert [rows.place(0), rows.place(1)] == [f"row 0 (line 3) of {path}", f"row 1 (line 5) of {path}"]


def test_blank_lines_count_as_lines_and_not_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.JSONL"
    path.write_bytes(b'\n{"a": 1}\r\n\n  \n{"a": 2}')
    rows = load_rows(str(path))
    assert (rows.rows, rows.place(1)) == ([{"a": 1}, {"a": 2}], f"row 1 (line 5) of {path}")


CALLS = [
    [{"role": "user", "content": "a"}, {"role": "tool", "arguments": {"city": "x", "days": [{"n": 1}]}}],
    [{"role": "user", "content": "b", "arguments": {"unit": "c", "days": [{"m": 2.5}, {"n": 3}]}}],
]


@pytest.mark.parametrize("directory", [False, True])
def test_nulls_that_arrow_adds_are_left_out_at_any_depth(tmp_path: Path, directory: bool) -> None:
    table = pyarrow.Table.from_pylist([{"input": chat, "label": None} for chat in CALLS])
    assert table.to_pylist()[0]["input"][0]["arguments"] is None, "Arrow does add them"
    if directory:
        datasets.Dataset(table).save_to_disk(tmp_path / "rows")
    else:
        pyarrow.parquet.write_table(table, tmp_path / "rows")
        (tmp_path / "rows").rename(tmp_path / "rows.parquet")
    path = tmp_path / ("rows" if directory else "rows.parquet")
    assert load_rows(str(path)).rows == [{"input": chat, "label": None} for chat in CALLS]


@pytest.mark.parametrize("directory", [False, True])
def test_json_columns_of_datasets_are_decoded(tmp_path: Path, directory: bool) -> None:
    chats: list[Any] = [[{"role": "user", "content": "a"}, {"role": 1, "x": None}], [{"content": [1, "b"]}]]
    features = datasets.Features({"input": datasets.List(datasets.Json())})
    saved = datasets.Dataset.from_dict({"input": chats}, features=features)
    if directory:
        saved.save_to_disk(tmp_path / "rows")
    else:
        saved.to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / ("rows" if directory else "rows.parquet")
    assert [row["input"] for row in load_rows(str(path)).rows] == chats


def test_arrow_values_that_are_not_what_their_type_says_name_their_row(tmp_path: Path) -> None:
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(np.array([0, 1, 3], "<i4").tobytes()), pyarrow.py_buffer(b"a\xff\xfe")],
    )
    pyarrow.parquet.write_table(pyarrow.table({"input": broken, "b": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 1 of .*a.parquet: column 'input' cannot be read \(UnicodeDecodeError"):
        load_rows(str(tmp_path / "a.parquet"))
    assert load_rows(str(tmp_path / "a.parquet"), columns=("b",)).rows == [{"b": 1}, {"b": 2}]


def test_broken_directory_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")
    for name, text in [("state.json", "[1]"), ("state.json", "{"), ("dataset_info.json", "{}x")]:
        kept = (tmp_path / "rows" / name).read_text()
        (tmp_path / "rows" / name).write_text(text)
        with pytest.raises(ValueError, match=f"data path={tmp_path / 'rows'} is not a directory that"):
            load_rows(str(tmp_path / "rows"))
        (tmp_path / "rows" / name).write_text(kept)
