"""Preference pairs: one prompt for both rows, chosen first, one EOS each; what is dropped is counted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from megarlhf.data.preferences import EQUAL, load_preference_rows
from megarlhf.data.supervised import SupervisedData
from tests.data.rows import load_with
from tests.data.test_sft import split

Write = Callable[[list[Any]], str]


def load(path: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> SupervisedData:
    settings: dict[str, Any] = {
        "prompt_key": "prompt",
        "chosen_key": "chosen",
        "rejected_key": "rejected",
        "margin": False,
        "values": False,
    }
    return load_with(load_preference_rows, path, tokenizer, **(settings | changes))


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]


def test_chosen_and_rejected_follow_one_prompt(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(
        [{"prompt": "a", "chosen": "b", "rejected": "cd"}, {"prompt": "", "chosen": "b", "rejected": "a"}]
    )
    rows = load(path, tokenizer, input_template="{}:").rows
    assert split(tokenizer, rows) == [
        (["<s>", "a", ":"], ["b", "</s>"]),
        (["<s>", "a", ":"], ["c", "d", "</s>"]),
        (["<s>", ":"], ["b", "</s>"]),
        (["<s>", ":"], ["a", "</s>"]),
    ]
    assert (rows.unit_ids.tolist(), rows.loss_mask, rows.fields, rows.scalars) == ([0, 0, 1, 1], None, {}, {})


def test_a_token_over_the_border_stays_out_of_the_prompt(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As one text " P" is one token: both rows still begin with the prompt's own tokens."""
    rows = load(write_jsonl([{"prompt": "a ", "chosen": "P", "rejected": "b"}]), tokenizer).rows
    assert split(tokenizer, rows) == [(["<s>", "a", "Ġ"], ["P", "</s>"]), (["<s>", "a", "Ġ"], ["b", "</s>"])]


def test_whole_texts_have_their_common_tokens_as_prompt(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([{"chosen": "a P", "rejected": "a b"}, {"chosen": "ab", "rejected": "a</s></s>"}])
    rows = load(path, tokenizer, prompt_key=None).rows
    assert split(tokenizer, rows) == [
        (["<s>", "a"], ["ĠP", "</s>"]),
        (["<s>", "a"], ["Ġ", "b", "</s>"]),
        (["<s>", "a"], ["b", "</s>"]),
        (["<s>", "a"], ["</s>"]),
    ]


def test_chats_whole_and_with_a_prompt_column_are_the_same(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = write_jsonl([{"chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "b", "c", "e")}])
    found = split(tokenizer, load(whole, tokenizer, prompt_key=None, apply_chat_template=True).rows)
    assert [answer for _, answer in found] == [["d", "</s>"], ["e", "</s>"]]
    assert found[0][0] == found[1][0]
    assert found[0][0][-4:] == ["c", "</s>", "Ċ", "<|assistant|>"]
    apart = write_jsonl([{"prompt": chat("a", "b", "c"), "chosen": "d", "rejected": chat("c", "e")[1:]}])
    assert split(tokenizer, load(apart, tokenizer, apply_chat_template=True).rows) == found


def test_equal_and_long_pairs_are_dropped_and_counted(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    answers = [("b", "b"), ("b", "cde"), ("b", "c"), ("bcd", "c"), ("b</s>", "b"), ("b", "cd")]
    path = write_jsonl([{"prompt": "a", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers])
    data = load(path, tokenizer, max_len=5)
    assert split(tokenizer, data.rows)[1::2] == [(["<s>", "a"], ["c", "</s>"]), (["<s>", "a"], ["c", "d", "</s>"])]
    assert (data.dropped, data.rows.num_units) == ({EQUAL: 2, "longer than max_len=5": 2}, 2)
    with pytest.raises(ValueError, match="max_len=3 drops all 6 rows .* 4 tokens"):
        load(path, tokenizer, max_len=3)
    with pytest.raises(ValueError, match="each of its 1 rows is one with chosen equal to rejected"):
        load(path, tokenizer, max_samples=1)


def test_values_are_read_at_the_eos(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """One token more in each row, for which `max_len` leaves room, and the loss on that target alone."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "cd", "margin": margin} for margin in ("0.5", 2)]
    found = load(write_jsonl(rows), tokenizer, values=True, margin=True, max_len=5).rows
    assert split(tokenizer, found)[:2] == [
        (["<s>", "a"], ["b", "</s>", "</s>"]),
        (["<s>", "a"], ["c", "d", "</s>", "</s>"]),
    ]
    assert found.loss_mask is not None
    assert found.loss_mask.tolist() == [False, False, True, False, False, False, True] * 2
    np.testing.assert_equal(found.scalars["margin"], np.float32([0.5, 0.5, 2, 2]))


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({}, {"chosen_key": "good"}, "row 0 .line 1. .*: chosen_key=good is not there; the keys are 'prompt'"),
        ({"rejected": None}, {}, "row 0 .*: rejected_key=rejected has no value"),
        ({"rejected": 3}, {}, "rejected_key=rejected holds a int, not a string"),
        ({"chosen": chat("a", "b")}, {}, "chosen_key=chosen holds a list, .*apply_chat_template"),
        (
            {"chosen": chat("a", "b"), "rejected": chat("c", "b")},
            {"apply_chat_template": True, "prompt_key": None},
            "row 0 .*: the chats of chosen_key=chosen and rejected_key=rejected differ before",
        ),
        (
            {"chosen": chat("a", "b"), "rejected": chat("a")},
            {"apply_chat_template": True, "prompt_key": None},
            "rejected_key=rejected: a whole chat ends with the assistant's message",
        ),
        ({"margin": True}, {"margin": True}, "row 0 .*: margin=True is not a number: correct it"),
        ({"margin": "much"}, {"margin": True}, "margin='much' is not a number"),
        ({}, {"margin": True}, "margin=None is not a number"),
        ({"chosen": ""}, {}, "row 0 .*: chosen_key=chosen is empty: remove the row"),
        ({"rejected": ""}, {"apply_chat_template": True}, "rejected_key=rejected: the last message is empty"),
        ({"prompt": ""}, {}, "row 0 .*: its prompt is empty"),
        ({}, {"prompt_key": None}, r"the texts have no common .* set prompt_key \(there is a column 'prompt'\), or"),
    ],
)
def test_bad_rows_are_refused(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = write_jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"} | row])
    with pytest.raises(ValueError, match=message):
        load(path, tokenizer, **changes)


def test_without_a_first_token_texts_must_begin_alike(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megarlhf.data.templates.special_prefix", lambda _: [])
    monkeypatch.setattr("megarlhf.data.preferences.special_prefix", lambda _: [])
    path = write_jsonl([{"prompt": "", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match="row 0 .*: the texts have no common beginning"):
        load(path, tokenizer, prompt_key=None)
    with pytest.raises(ValueError, match="row 0 .*: its prompt is empty"):
        load(path, tokenizer)
