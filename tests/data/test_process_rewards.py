"""Solutions with a label for each step: which targets the loss looks at, and what it finds there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from megarlhf.data.process_rewards import load_process_reward_rows
from megarlhf.data.supervised import SupervisedData
from tests.data.rows import load_with

Write = Callable[[list[Any]], str]


def load(path: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> SupervisedData:
    settings: dict[str, Any] = {
        "input_key": "input",
        "label_key": "label",
        "placeholder_token": "#",
        "reward_tokens": ("+", "-"),
    }
    return load_with(load_process_reward_rows, path, tokenizer, **(settings | changes))


def judged(tokenizer: PreTrainedTokenizerBase, data: SupervisedData, field: str) -> list[tuple[str, str, Any]]:
    """Token whose output is judged, the tokens before it, and what the field says, of each target the loss looks at."""
    rows, found = data.rows, []
    assert rows.loss_mask is not None and (rows.prompt_lengths == 1).all()
    place = 0
    for ids in np.split(rows.input_ids, np.cumsum(rows.lengths)[:-1]):
        tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
        for position in range(len(tokens) - 1):
            value = rows.fields[field][place].tolist()
            if rows.loss_mask[place]:
                found.append((tokens[position], "".join(tokens[:position]), value))
            else:
                assert not np.any(value)
            place += 1
    assert place == len(rows.loss_mask)
    return found


def test_hard_and_soft_labels_at_their_placeholders(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([{"input": "a#b#", "label": ["-", "+"]}, {"input": "##c", "label": [0.25, 1]}])
    data = load(path, tokenizer)
    assert judged(tokenizer, data, "shares") == [
        ("#", "<s>a", [0.0, 1.0]),
        ("#", "<s>a#b", [1.0, 0.0]),
        ("#", "<s>", [0.25, 0.75]),
        ("#", "<s>#", [1.0, 0.0]),
    ]
    assert data.rows.lengths.tolist() == [6, 4], "only a placeholder at the end has a token put behind it"
    assert data.rows.unit_ids.tolist() == [0, 1]


def test_several_tokens_and_any_token(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([{"input": "a#b#", "label": ["y", "z"]}])
    shares = judged(tokenizer, load(path, tokenizer, reward_tokens=("x", "y", "z")), "shares")
    assert [value for *_, value in shares] == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    ids = [value for *_, value in judged(tokenizer, load(path, tokenizer, reward_tokens=None), "label_ids")]
    assert tokenizer.convert_ids_to_tokens([int(value) for value in ids]) == ["y", "z"]


def test_chats_are_rendered_whole(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b#"}]
    data = load(write_jsonl([{"input": chat, "label": ["+"]}]), tokenizer, apply_chat_template=True)
    assert judged(tokenizer, data, "shares") == [("#", "<s><|user|>a</s>Ċ<|assistant|>b", [1.0, 0.0])]
    path = write_jsonl([{"input": chat, "label": ["+"], "tools": [{"name": "f"}]}])
    with pytest.raises(ValueError, match="row 0 .*: it has tools, which the chat template leaves out"):
        load(path, tokenizer, apply_chat_template=True)
    path = write_jsonl([{"input": "a#", "label": ["+"]}])
    assert judged(tokenizer, load(path, tokenizer, input_template="q{}b"), "shares") == [("#", "<s>qa", [1.0, 0.0])]


def test_long_rows_are_dropped_and_counted(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([{"input": "a" * n + "#", "label": ["+"]} for n in (1, 3, 2)])
    data = load(path, tokenizer, max_len=4)  # BOS, text, placeholder: 3, 5, 4 tokens
    assert (len(data.rows), data.dropped) == (2, {"longer than max_len=4": 1})
    assert [len(before) for _, before, _ in judged(tokenizer, data, "shares")] == [4, 5]
    with pytest.raises(ValueError, match="max_len=2 drops all 3 rows .* 3 tokens"):
        load(path, tokenizer, max_len=2)


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"input": "a#b#", "label": ["+"]}, {}, r"row 1 \(line 2\) of .*: label_key=label has 1 labels.* 2 tokens"),
        ({"input": "a", "label": []}, {}, "has 0 labels, and the text 0 tokens placeholder_token='#'"),
        ({"input": "a#", "label": "+"}, {}, "label_key=label holds a str, not a list"),
        ({"input": "a#"}, {}, "row 1 .*: label_key=label is not there; the keys are 'input'"),
        ({"label": ["+"]}, {}, "row 1 .*: input_key=input is not there"),
        ({"input": 3, "label": ["+"]}, {}, "its prompt holds a int, not a string"),
        ({"input": "a#", "label": ["?"]}, {}, r"row 1 .*: label_key=label: '\?' is none of reward_tokens=\+ -"),
        ({"input": "a#", "label": [1.5]}, {}, "1.5 is neither a reward token nor a probability"),
        ({"input": "a#", "label": [True]}, {}, "True is neither"),
        ({"input": "a#", "label": [0.5]}, {"reward_tokens": ("+", "-", "y")}, r"\+ - y are 3: give two"),
        ({"input": "a#", "label": [0.5]}, {"reward_tokens": None}, "numbers need two reward_tokens"),
        ({"input": "a#", "label": ["++"]}, {"reward_tokens": None}, r"label='\+\+' is 2 tokens of tokenizer="),
        ({"input": "a#", "label": ["+"]}, {"placeholder_token": "ab"}, "placeholder_token='ab' is 2 tokens"),
        ({"input": "a#", "label": ["+"]}, {"placeholder_token": ""}, "placeholder_token='' is 0 tokens"),
        ({"input": "a#", "label": ["+"]}, {"reward_tokens": ("+", "no")}, "reward_tokens='no' is 2 tokens"),
        ({"input": "a#", "label": ["+"]}, {"reward_tokens": ("+", "+")}, r"reward_tokens=\+ \+ names a token twice"),
        ({"input": "a#", "label": ["+"]}, {"reward_tokens": ("+",)}, r"reward_tokens=\+ leaves nothing to decide"),
        ({"input": "a#", "label": ["+"]}, {"vocab_size": 9}, r"reward_tokens='\+' is token .* vocab_size=9"),
    ],
)
def test_bad_rows_and_settings_are_refused(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    good = {"input": "a#", "label": ["+"]}
    with pytest.raises(ValueError, match=message):
        load(write_jsonl([good, row]), tokenizer, **changes)
