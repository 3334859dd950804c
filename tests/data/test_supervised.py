"""Supervised rows in files, which the ranks of a machine share."""

from pathlib import Path

import numpy as np
import pytest

from megarlhf.data.supervised import SupervisedData, data_lines, rows_in_both
from megarlhf.data.types import training_rows


def test_what_is_opened_is_what_was_saved_and_cannot_be_changed(tmp_path: Path) -> None:
    rows = training_rows([[5, 6, 7], [8, 9], [1, 2, 3, 4]], [1, 1, 3])
    data = SupervisedData(rows=rows, dropped={"too long": 7})
    data.save(tmp_path / "rows")
    opened = SupervisedData.open(tmp_path / "rows")
    assert opened.rows.input_ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4] and opened.rows.input_ids.dtype == np.int32
    assert opened.rows.lengths.tolist() == [3, 2, 4] and opened.rows.lengths.dtype == np.int64
    assert opened.rows.prompt_lengths.tolist() == [1, 1, 3]
    assert opened.rows.unit_ids.tolist() == [0, 1, 2]
    assert (opened.dropped, opened.fingerprint) == ({"too long": 7}, data.fingerprint)
    taken = opened.rows.take([2, 0])
    assert (taken.input_ids.tolist(), taken.prompt_lengths.tolist()) == ([1, 2, 3, 4, 5, 6, 7], [3, 1])
    with pytest.raises(ValueError, match="read-only"):
        opened.rows.input_ids[0] = 1


def test_opened_rows_outlive_their_directory(tmp_path: Path) -> None:
    SupervisedData(rows=training_rows([[5, 6]], [1])).save(tmp_path / "rows")
    opened = SupervisedData.open(tmp_path / "rows")
    for file in (tmp_path / "rows" / "rows").iterdir():
        file.unlink()
    assert opened.rows.take([0]).input_ids.tolist() == [5, 6]


def test_units_are_trained_on_where_all_of_their_rows_are() -> None:
    """Several rejected answers to one chosen one share it; a border is no token."""
    first, second, third = ([[1, 2], [1, rejected]] for rejected in (3, 4, 5))
    training = training_rows([*first, *second], [1] * 4, unit_ids=[0, 0, 1, 1])
    evaluation = training_rows([*second, *third, [1, 2, 1, 3]], [1] * 5, unit_ids=[0, 0, 1, 1, 2])
    assert rows_in_both(training, training) == 2 and rows_in_both(training, evaluation) == 1
    told = data_lines(SupervisedData(rows=training), SupervisedData(rows=evaluation))
    assert "warning: 1 of 3 evaluation rows are trained on too" in told and "eval_split" not in told
