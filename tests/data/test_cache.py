"""Tokenized data that is kept: read again for an equal key only, whole, and never in silence unwritten."""

from pathlib import Path

import numpy as np
import pytest

from megarlhf.data.cache import cached, file_stamps
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import training_rows


def data(first: int) -> SupervisedData:
    return SupervisedData(rows=training_rows([[first, 6, 7]], [1]), dropped={"too long": first})


def refuse() -> SupervisedData:
    raise AssertionError("it is there already")


def test_an_equal_key_finds_what_was_made(tmp_path: Path) -> None:
    directory = str(tmp_path / "new" / "cache")
    made, place = cached(directory, {"a": [1, "x"], "b": None}, lambda: data(3))
    found, again = cached(directory, {"b": None, "a": (1, "x")}, refuse)
    assert (again, found.fingerprint, found.dropped) == (place, made.fingerprint, {"too long": 3})
    assert np.array_equal(found.rows.input_ids, [3, 6, 7])
    other, elsewhere = cached(directory, {"a": [1, "y"], "b": None}, lambda: data(4))
    assert other.fingerprint != made.fingerprint and elsewhere != place
    assert sorted(path.name for path in Path(directory).iterdir()) == sorted((place.name, elsewhere.name))


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="already"):
        cached(str(tmp_path), {}, refuse)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data_cache_path=.*cannot be written .*leave it out"):
        cached(str(tmp_path / "file"), {}, lambda: data(3))


def test_another_run_may_come_first(tmp_path: Path) -> None:
    def slow() -> SupervisedData:
        cached(str(tmp_path), {}, lambda: data(3))
        return data(3)

    _, place = cached(str(tmp_path), {}, slow)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_stamps_tell_files_apart(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    files = [tmp_path / "a", tmp_path / "deep" / "b"]
    for file in files:
        file.write_text("1")
    seen = [file_stamps([str(tmp_path)])]
    assert file_stamps([str(files[1]), str(files[0])]) == seen[0]
    files[1].write_text("22")
    seen.append(file_stamps([str(tmp_path)]))
    files[1].write_text("33")
    seen.append(file_stamps([str(tmp_path)]))
    (tmp_path / "c").write_text("")
    seen.append(file_stamps([str(tmp_path)]))
    assert len(set(map(tuple, seen))) == 4
