"""Supervised rows: which tokens are prompt and which are targets, and the one EOS at the end."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from megarlhf.data.sft import load_sft_rows
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import TrainingRows
from tests.data.rows import load_with

Write = Callable[[list[Any]], str]


def load(path: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> SupervisedData:
    settings: dict[str, Any] = {
        "input_key": "input",
        "output_key": "output",
        "pretrain_mode": False,
        "multiturn": False,
    }
    return load_with(load_sft_rows, path, tokenizer, **(settings | changes))


def split(tokenizer: PreTrainedTokenizerBase, rows: TrainingRows) -> list[tuple[list[str], list[str]]]:
    """Prompt and targets of each row."""
    found, tokens = [], tokenizer.convert_ids_to_tokens(rows.input_ids.tolist())
    for length, prompt_length in zip(rows.lengths.tolist(), rows.prompt_lengths.tolist(), strict=True):
        found.append((tokens[:prompt_length], tokens[prompt_length:length]))
        tokens = tokens[length:]
    assert not tokens, "every token is a row's"
    return found


def test_loss_is_on_the_answer_and_one_eos(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([{"input": "ab", "output": "cd"}, {"input": "a", "output": "d</s></s>"}])
    rows = load(path, tokenizer, input_template="{}:").rows
    assert split(tokenizer, rows) == [
        (["<s>", "a", "b", ":"], ["c", "d", "</s>"]),
        (["<s>", "a", ":"], ["d", "</s>"]),
    ]
    assert (rows.unit_ids.tolist(), rows.loss_mask, rows.fields, rows.scalars) == ([0, 1], None, {}, {})
    assert rows.input_ids.dtype == np.int32


def test_prompt_tokens_are_those_of_the_prompt_alone(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """As one text " P" is one token; generation starts after the prompt's own space."""
    path = write_jsonl([{"input": "A: ", "output": "P"}, {"input": "A:", "output": " P"}])
    apart, joint = split(tokenizer, load(path, tokenizer).rows)
    assert apart == (["<s>", "A", ":", "Ġ"], ["P", "</s>"])
    assert joint == (["<s>", "A", ":"], ["ĠP", "</s>"])


def test_conditional_sft_is_sft_on_scored_prompts(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """'{input} <rm_score>: {reward:.2f} ' + output: the prompt ends in the space that generation starts after."""
    path = write_jsonl([{"input": f"a <rm_score>: {2 / 3:.2f} ", "output": "P"}])
    ((prompt, response),) = split(tokenizer, load(path, tokenizer).rows)
    assert prompt == ["<s>", *"aĠ<rm_score>:Ġ0.67Ġ"] and response == ["P", "</s>"]


def test_chat_with_an_output_column(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = [{"role": "assistant", "content": "b"}]
    path = write_jsonl([{"input": "a", "output": "b"}, {"input": [{"role": "user", "content": "a"}], "output": answer}])
    rows = split(tokenizer, load(path, tokenizer, apply_chat_template=True).rows)
    assert rows == [(["<s>", "<|user|>", "a", "</s>", "Ċ", "<|assistant|>"], ["b", "</s>"])] * 2


def test_whole_chat_trains_its_last_turn(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = [{"role": role, "content": content} for role, content in turns]
    data = load(write_jsonl([{"input": chat}]), tokenizer, output_key=None, apply_chat_template=True)
    ((prompt, response),) = split(tokenizer, data.rows)
    assert response == ["d", "</s>"]
    assert "b" in prompt
    assert prompt[-3:] == ["</s>", "Ċ", "<|assistant|>"]


def test_pretrain_mode_trains_everything_after_the_first_token(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl([{"input": "ab", "output": "c"}])
    rows = load(path, tokenizer, pretrain_mode=True).rows
    assert split(tokenizer, rows) == [(["<s>"], ["a", "b", "c", "</s>"])]
    rows = load(path, tokenizer, pretrain_mode=True, output_key=None).rows
    assert split(tokenizer, rows) == [(["<s>"], ["a", "b", "</s>"])]


def test_long_rows_are_dropped_and_counted(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([{"input": "a", "output": "b" * length} for length in (1, 3, 2)])
    data = load(path, tokenizer, max_len=5)  # BOS, a, answer, EOS: 4, 6, 5 tokens
    kept = [(["<s>", "a"], ["b", "</s>"]), (["<s>", "a"], ["b", "b", "</s>"])]
    assert (split(tokenizer, data.rows), sum(data.dropped.values())) == (kept, 1)
    assert len(load(path, tokenizer, max_samples=1).rows) == 1
    with pytest.raises(ValueError, match="max_len=3 drops all 3 rows .* 4 tokens"):
        load(path, tokenizer, max_len=3)


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"input": "a"}, {}, "row 0 .*: output_key=output is not there; the keys are 'input'"),
        ({}, {}, "row 0 .*: input_key=input is not there; the keys are none, for the row is empty"),
        ({"input": "a", "output": ""}, {}, "row 0 .*: output_key=output is empty: remove the row"),
        ({"input": "a", "output": ""}, {"apply_chat_template": True}, "output_key=output: the last message is empty"),
        ({"input": "", "output": "b"}, {}, "row 0 .*: its prompt is empty: remove the row"),
        ({"input": ""}, {"output_key": None, "pretrain_mode": True}, "row 0 .*: its prompt is empty"),
        ({"input": "a", "output": "</s>"}, {}, "row 0 .*: it has nothing to train on but the EOS"),
        ({"input": "a", "output": "</s>"}, {"apply_chat_template": True}, "nothing to train on but the EOS"),
        ({"input": "a", "output": 3}, {}, "output_key=output holds a int"),
        ({"input": "a"}, {"output_key": None, "apply_chat_template": True}, "ends with the assistant's message"),
    ],
)
def test_bad_rows_and_settings_are_refused(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(write_jsonl([row]), tokenizer, **changes)


def test_template_that_rewrites_the_prompt_is_refused(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}{{ messages[-1]['content'] }}")
    with pytest.raises(ValueError, match="does not begin with its rendered prompt"):
        load(write_jsonl([{"input": "a", "output": "b"}]), tokenizer, apply_chat_template=True)


def test_tokenizer_without_eos_is_refused(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="has no EOS"):
        load(write_jsonl([{"input": "a", "output": "b"}]), endless)
