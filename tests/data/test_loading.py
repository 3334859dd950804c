"""Rows come back as they were written, from every kind of file; broken files say where."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megarlhf.data.loading import DataSource, load_rows

ROWS = [{"input": "a, b", "label": "007"}, {"input": 'line\n"two"', "label": "1"}]


def write(tmp_path: Path, kind: str) -> str:
    path = tmp_path / f"rows{kind}"
    if kind == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "_lines.json":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif kind == ".csv":
        path.write_text('input,label\n"a, b",007\n"line\n""two""",1\n', encoding="utf-8")
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == ".arrow":
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return str(path) if kind != "_stream" else str(path / "data-00000-of-00001.arrow")


KINDS = [".jsonl", ".json", "_lines.json", ".csv", ".parquet", ".arrow", "_stream", "_directory"]


@pytest.mark.parametrize("kind", KINDS)
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
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"line 2: it is not JSON: [^(]*\(char 5\)$"),
        ("a.jsonl", '{"a": 1}\n{"a": ', r"line 2: it is not JSON: .*\(the file ends in this line: was it cut off\?\)"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: it is a list"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n{"a"\n', "(?s)line 3: it is a list.*line 4: it is not JSON"),
        ("a.jsonl", "[1]\n" * 8, "(?s)line 5: it is a list.*a.jsonl: 3 more rows"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "line 1: it is not JSON: Exceeds the limit"),
        ("a.jsonl", "[" * 100_000, "line 1: it is not JSON: maximum recursion"),
        ("a.json", '[{"a": 1}, 2, 3]', "(?s)entry 1: it is a int.*entry 2: it is a int"),
        ("a.csv", "a,a\n1,2\n", "several columns named 'a'"),
        ("a.json", '{"a": 1}', "holds a dict, not a list"),
        ("a.json", '{"a": 1}\n{"a": 2', r"line 2: it is not JSON: .*\(the file ends in this line"),
        ("a.json", '[\n{"a": 1}\n]\n{"a": 2}\n', "a.json: it is not JSON: Extra data: line 4"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: the header has 2 columns"),
        ("a.csv", 'a,b\n1,"2\n', "is not CSV"),
        ("a.csv", "a,b\n", "no rows"),
        ("a.parquet", "x" * 20, "not a Parquet file"),
        ("a.arrow", "x" * 20, "not an Arrow file"),
        ("a.arrow", "ARROW1" + "x" * 20, "not an Arrow file"),
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
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds the splits train, test; one is"):
        load_rows(str(tmp_path / "splits"))
    assert len(load_rows(str(tmp_path / "splits" / "train"))) == 2


@pytest.mark.parametrize(
    ("name", "before", "where"),
    [
        ("a.jsonl", b'{"a": "x"}\n{"a": "', "line 2: it is not UTF-8"),
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


def numbered(path: Path, numbers: range) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))
    return str(path)


def numbers(source: str | DataSource, **options: Any) -> list[int]:
    return [row["n"] for row in load_rows(source, **options).rows]


def test_files_of_a_directory_by_their_split(tmp_path: Path) -> None:
    for name, n in [("data/train-00001-of-00002", 2), ("data/train-00000-of-00002", 0), ("test/b", 4), ("dev_set", 6)]:
        numbered(tmp_path / f"{name}.jsonl", range(n, n + 2))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("train")
    numbered(tmp_path / ".cache" / "train.jsonl", range(100, 101))
    given = str(tmp_path)
    assert numbers(DataSource(names=given, split="train")) == [0, 1, 2, 3]
    assert numbers(DataSource(names=f"json@{given}", split="train"), limit=3) == [0, 1, 2]
    assert numbers(DataSource(names=given, split="test")) == [4, 5]
    assert numbers(DataSource(names=given, split="validation")) == [6, 7]
    with pytest.raises(ValueError, match="holds the splits train, validation, test; not heldout: name one"):
        load_rows(DataSource(names=given, split="heldout"))
    with pytest.raises(ValueError, match="one is read at a time"):
        load_rows(given)
    place = load_rows(DataSource(names=given, split="train")).place(3)
    assert place == f"row 1 (line 2) of {tmp_path / 'data/train-00001-of-00002.jsonl'}"
    numbered(tmp_path / "more.jsonl", range(1))
    with pytest.raises(ValueError, match=r"more.jsonl says no split"):
        load_rows(given)
    (tmp_path / "rows.csv").write_text("n\n1\n")
    with pytest.raises(ValueError, match=r"holds .csv and .jsonl files.*csv@"):
        load_rows(given)
    assert numbers(f"csv@{given}") == ["1"]


def test_splits_with_names_of_their_own(tmp_path: Path) -> None:
    numbered(tmp_path / "train_sft-00000-of-00001.jsonl", range(2))
    numbered(tmp_path / "train_gen-00000-of-00001.jsonl", range(2, 3))
    assert numbers(DataSource(names=str(tmp_path), split="train_sft")) == [0, 1]
    with pytest.raises(ValueError, match="train_gen, train_sft; not train"):
        load_rows(DataSource(names=str(tmp_path), split="train"))


def test_a_file_and_a_directory_without_splits_are_train(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", range(2))
    numbered(tmp_path / "b.jsonl", range(2, 3))
    for name, all_of_it in ((path, [0, 1]), (str(tmp_path), [0, 1, 2])):
        assert numbers(DataSource(names=name, split="train")) == numbers(name) == all_of_it
        with pytest.raises(ValueError, match="splits train; not test"):
            load_rows(DataSource(names=name, split="test"))


def test_saved_splits(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([{"n": n}]) for n, name in enumerate(("train", "other", "dev", "val"))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = [numbers(DataSource(names=str(tmp_path / "saved"), split=name)) for name in splits]
    assert found == [[0], [1], [2], [3]]
    (tmp_path / "saved" / "dataset_dict.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a directory that datasets' save_to_disk wrote"):
        load_rows(str(tmp_path / "saved"))


def test_several_data_sets_are_mixed_as_datasets_does_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [numbered(tmp_path / f"{start}.jsonl", range(start, start + 50)) for start in (0, 100, 200)]
    probs = (0.6, 0.3, 0.1)
    source = DataSource(names=", ".join(names), probs=probs, seed=3)
    parts = [datasets.Dataset.from_list(load_rows(name).rows) for name in names]
    expected = datasets.interleave_datasets(parts, list(probs), seed=3, stopping_strategy="first_exhausted")["n"][:]
    assert numbers(source) == expected and max(n for n in expected if n < 100) == 49
    assert f"50 of 50 rows of {names[0]}, {sum(100 <= n < 200 for n in expected)} of 50 rows of" in caplog.text
    limited = [part.select(range(20)) for part in parts]
    expected = datasets.interleave_datasets(limited, list(probs), seed=3, stopping_strategy="first_exhausted")["n"][:20]
    assert numbers(source, limit=20) == expected
    rows = load_rows(source)
    for index, n in enumerate(numbers(source)):
        assert rows.place(index) == f"row {n % 100} (line {n % 100 + 1}) of {names[n // 100]}"
    assert numbers(",".join(names)) == [*range(50), *range(100, 150), *range(200, 250)]


def test_what_is_wrong_with_each_of_several_data_sets_comes_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": ')
    (tmp_path / "b.csv").write_text("n,n\n1,2\n")
    numbered(tmp_path / "c.jsonl", range(2))
    with pytest.raises(ValueError, match="(?s)a.jsonl, line 2: it is not JSON.*b.csv has several columns named 'n'"):
        load_rows(",".join(str(tmp_path / name) for name in ("a.jsonl", "b.csv", "c.jsonl")))


def test_what_is_held_out_is_in_no_training_row(tmp_path: Path) -> None:
    """Also where rows are repeated, in the columns that are read."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n % 40, "id": n}) + "\n" for n in range(120)))
    found = {
        side: numbers(DataSource(names=str(path), held_out=0.1, is_held_out=side, seed=7), columns=("n",))
        for side in (True, False)
    }
    assert len(set(found[True])) == 4 and not set(found[True]) & set(found[False])
    assert sorted(found[True] + found[False]) == sorted(n % 40 for n in range(120))
    other = DataSource(names=str(path), held_out=0.1, is_held_out=True, seed=8)
    assert set(numbers(other, columns=("n",))) != set(found[True])
    assert len(numbers(DataSource(names=str(path), held_out=0.001, is_held_out=True), columns=("n",))) == 3
    with pytest.raises(ValueError, match="has 1 different rows, of which 1 are held out"):
        load_rows(DataSource(names=numbered(tmp_path / "b.jsonl", range(1)), held_out=0.5))


def test_what_is_held_out_is_in_no_other_data_set_either(tmp_path: Path) -> None:
    names = [numbered(tmp_path / "a.jsonl", range(60)), numbered(tmp_path / "b.jsonl", range(40, 90))]
    source = DataSource(names=",".join(names), held_out=0.2)
    training, evaluation = numbers(source), numbers(replace(source, is_held_out=True))
    assert not set(training) & set(evaluation) and len(training) + len(evaluation) == 110
    assert len(set(evaluation)) >= 20 and {"a" if n < 40 else "b" for n in evaluation} == {"a", "b"}
    names.append(numbered(tmp_path / "c.jsonl", range(evaluation[0], evaluation[0] + 1)))
    with pytest.raises(ValueError, match="c.jsonl has 1 different rows, of which 1 are held out"):
        load_rows(replace(source, names=",".join(names)))
