"""Rows come back as they were written, from every kind of file; broken files say where."""

import json
from pathlib import Path

import datasets
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
    rows = load_rows(write(tmp_path, kind))
    assert [rows[index] for index in range(len(rows))] == ROWS


def test_json_values_keep_their_own_types(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"label": 1}\n{"label": "x"}\n{"messages": [{"role": "user"}]}\n')
    assert load_rows(str(path)) == [{"label": 1}, {"label": "x"}, {"messages": [{"role": "user"}]}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is a list"),
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
    with pytest.raises(ValueError, match="does not exist"):
        load_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="save_to_disk"):
        load_rows(str(tmp_path))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="splits/train"):
        load_rows(str(tmp_path / "splits"))
    assert len(load_rows(str(tmp_path / "splits" / "train"))) == 2
