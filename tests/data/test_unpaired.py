"""Labelled answers: labels of every spelling, unmatched answers that are never a prompt's own, and balance."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from megarlhf.data.supervised import SupervisedData
from megarlhf.data.unpaired import UNMATCHED, balance_warning, load_labelled_rows, unmatched_answers
from tests.data.rows import load_with
from tests.data.test_sft import split

Write = Callable[[list[Any]], str]


def load(path: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> SupervisedData:
    settings: dict[str, Any] = {
        "input_key": "input",
        "output_key": "output",
        "label_key": "label",
    }
    return load_with(load_labelled_rows, path, tokenizer, **(settings | changes))


def test_labels_of_every_spelling(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    labels = [1, 0, True, False, "1", "0", "true", "False", 1.0]
    path = write_jsonl([{"input": f"{i}", "output": "abcdefghi"[i], "label": v} for i, v in enumerate(labels)])
    data = load(path, tokenizer, input_template="{}:")
    assert data.rows.scalars["desirable"].tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert split(tokenizer, data.rows)[2] == (["<s>", "2", ":"], ["c", "</s>"])
    assert data.rows.unit_ids.tolist() == list(range(9))


def test_unmatched_rows_are_other_prompts_answers(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows come in twos with one prompt, as unrolled pairs do; one answer, b, is everywhere."""
    rows = [
        {"input": f"{number // 2}", "output": "b" if number % 2 else f"a{number}", "label": number % 2}
        for number in range(12)
    ]
    data = load(write_jsonl(rows), tokenizer)
    assert data.unmatched is not None
    matched, unmatched = split(tokenizer, data.rows), split(tokenizer, data.unmatched)
    assert [prompt for prompt, _ in matched] == [prompt for prompt, _ in unmatched]
    known = {(tuple(prompt), tuple(answer)) for prompt, answer in matched}
    answers = {tuple(answer) for _, answer in matched}
    for prompt, answer in unmatched:
        assert tuple(answer) in answers and (tuple(prompt), tuple(answer)) not in known
    assert len({tuple(answer) for _, answer in unmatched}) > 3, "they are drawn from all of the data"
    again = load(write_jsonl(rows), tokenizer).unmatched
    assert again is not None
    np.testing.assert_array_equal(again.input_ids, data.unmatched.input_ids)


def test_unmatched_answers_fit() -> None:
    pairs = [([1], [2] * 6), ([3] * 4, [4, 4]), ([5], [6])]
    assert unmatched_answers(pairs, max_len=7) == [1, 2, 1] or unmatched_answers(pairs, max_len=7) == [2, 2, 1]
    assert unmatched_answers([([1], [2]), ([1], [3])], max_len=9) == [None, None]
    assert unmatched_answers([([1], [2]), ([3], [2])], max_len=9) == [None, None]


def test_rows_without_an_unmatched_answer_are_dropped_and_counted(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Behind the long prompt only its own answer fits, which remains an answer to another."""
    rows = [{"input": "aaa", "output": "b", "label": 0}, {"input": "c", "output": "dd", "label": 1}]
    data = load(write_jsonl(rows), tokenizer, max_len=6)
    assert data.dropped == {"longer than max_len=6": 0, UNMATCHED: 1} and data.unmatched is not None
    assert split(tokenizer, data.rows) == [(["<s>", "c"], ["d", "d", "</s>"])]
    assert data.rows.scalars["desirable"].tolist() == [1]
    assert split(tokenizer, data.unmatched) == [(["<s>", "c"], ["b", "</s>"])]


def test_long_rows_are_dropped_and_counted(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([{"input": f"{n}", "output": "b" * n, "label": n % 2} for n in (1, 2, 9)])
    data = load(path, tokenizer, max_len=6)
    assert (len(data.rows), data.dropped) == (2, {"longer than max_len=6": 1, UNMATCHED: 0})
    assert data.rows.scalars["desirable"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"label": 2}, {}, "row 0 .line 1. .*: label_key=label holds 2: a label is 1, 0, true or false"),
        ({"label": "good"}, {}, "row 0 .*: label_key=label holds 'good'"),
        ({"label": None}, {}, "row 0 .*: label_key=label has no value"),
        ({}, {"label_key": "mark"}, "label_key=mark is not there; the keys are 'input', 'output', 'label'"),
        ({"output": 3}, {}, "output_key=output holds a int, not a string"),
        ({}, {"output_key": None, "apply_chat_template": True}, "input_key=input: a whole chat ends with"),
        ({"input": "x"}, {}, "for none of 2 rows an answer to another prompt differs .* and fits into max_len=100"),
        ({"output": ""}, {}, "row 0 .*: output_key=output is empty"),
        ({"output": ""}, {"apply_chat_template": True}, "row 0 .*: output_key=output: the last message is empty"),
        ({"input": ""}, {}, "row 0 .*: its prompt is empty"),
    ],
)
def test_bad_rows_are_refused(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = write_jsonl([{"input": "a", "output": "b", "label": 1} | row, {"input": "x", "output": "c", "label": 0}])
    with pytest.raises(ValueError, match=message):
        load(path, tokenizer, **changes)


@pytest.mark.parametrize(
    ("labels", "weights", "said"),
    [
        ([1, 0], (1.0, 1.0), None),
        ([1, 1, 1, 1, 0, 0, 0], (1.0, 1.0), None),
        ([1, 1, 1, 0], (1.0, 2.7), None),
        ([1, 1, 0], (1.0, 1.0), "2 desirable answers .* against 1 undesirable .* set desirable_loss_weight to 0.5 or"),
        ([1, 0, 0, 0], (1.0, 1.0), "set desirable_loss_weight to 3 or a third more"),
        ([1, 1], (1.0, 1.0), "add answers of the other label"),
    ],
)
def test_labels_far_from_balanced_are_told(
    write_jsonl: Write,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[int],
    weights: tuple[float, float],
    said: str | None,
) -> None:
    rows = [{"input": f"{i}", "output": f"{i}", "label": label} for i, label in enumerate(labels)]
    data = load(write_jsonl(rows), tokenizer)
    found = balance_warning(data, desirable_weight=weights[0], undesirable_weight=weights[1])
    assert (found is None) if said is None else re.search(said, str(found))
