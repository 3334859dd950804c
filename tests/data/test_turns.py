"""Which tokens of a chat have a loss: those that the assistant says, as Transformers marks them, or none at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megarlhf.data.sft import load_sft_rows
from megarlhf.data.templates import TOOLS
from megarlhf.data.types import TrainingRows
from tests.data.rows import load_with

Write = Callable[[list[Any]], str]

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{{ m['content'] }}</s>{{ '\n' }}{% else %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}</s>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ m['content'] }}</s>{{ '\n' }}{% else",
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{{ '\n' }}{% else",
)
# As Qwen 3's: what was thought is shown in the last turn only.
THINKING = "{% if loop.last %}thought {{ m['content'] }}{% else %}{{ m['content'] }}{% endif %}"
REWRITING = PLAIN.replace("<|assistant|>{{ m['content'] }}", f"<|assistant|>{THINKING}")
MARKED_REWRITING = MARKED.replace("{% generation %}{{ m['content'] }}", f"{{% generation %}}{THINKING}")
WITH_TOOLS = "{% if tools %}{% for t in tools %}<{{ t['function']['name'] }}>{% endfor %}{% endif %}" + PLAIN

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi  there"},
    {"role": "assistant", "content": " PP "},
    {"role": "user", "content": "P"},
    {"role": "assistant", "content": ""},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "it is\n42"},
]


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    """The tokenizer, whose template a test may set."""
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    return tokenizer


def load(path: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> TrainingRows:
    settings: dict[str, Any] = {
        **{"input_key": "input", "output_key": None, "apply_chat_template": True},
        **{"max_len": 200, "pretrain_mode": False, "multiturn": True},
    }
    return load_with(load_sft_rows, path, tokenizer, **(settings | changes)).rows


def spelled(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int32]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def trained(rows: TrainingRows) -> list[list[bool]]:
    """Of each row, whether each of its tokens has a loss."""
    assert rows.loss_mask is not None
    masks = np.split(rows.loss_mask, np.cumsum(rows.num_targets)[:-1])
    return [[False] * prompt + mask.tolist() for prompt, mask in zip(rows.prompt_lengths.tolist(), masks, strict=True)]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["turn by turn", "marked"])
def test_every_turn_is_trained_as_transformers_marks_it(
    own: PreTrainedTokenizerBase, write_jsonl: Write, template: str
) -> None:
    own.chat_template = template
    path = write_jsonl([{"input": CHAT}, {"input": CHAT[1:3]}])
    rows = load(path, own)
    own.chat_template = MARKED
    expected = own.apply_chat_template(
        [CHAT, CHAT[1:3]], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = np.split(rows.input_ids, np.cumsum(rows.lengths)[:-1])
    for row, mask, theirs, marks in zip(
        ids, trained(rows), expected["input_ids"], expected["assistant_masks"], strict=True
    ):
        assert row.tolist() == theirs[:-1], "all but the line break after the last turn"
        assert mask == [bool(mark) for mark in marks[:-1]]
    assert rows.num_loss_targets.tolist() == [sum(marks) for marks in expected["assistant_masks"]]
    assert rows.count_loss_targets(np.array([1, 0, 1])) == sum(map(sum, [*expected["assistant_masks"] * 2][1:]))


def test_the_last_turn_alone_is_trained_without_multiturn(own: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    path = write_jsonl([{"input": CHAT}])
    last, every = load(path, own, multiturn=False), load(path, own)
    assert last.input_ids.tolist() == every.input_ids.tolist()
    (mask,) = trained(every)
    start = int(last.prompt_lengths[0])
    assert all(mask[start:]) and any(mask[:start]) and last.loss_mask is None


@pytest.mark.parametrize("multiturn", [True, False])
def test_an_empty_last_message_is_refused_unless_it_calls_tools(
    own: PreTrainedTokenizerBase, write_jsonl: Write, multiturn: bool
) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    own.chat_template = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] or m['tool_calls'] or '' }}", 1)
    assert len(load(write_jsonl([{"input": [*CHAT[:-1], call]}]), own, multiturn=multiturn)) == 1
    for content in ("", [{"type": "text", "text": ""}]):
        path = write_jsonl([{"input": [*CHAT[:-1], {"role": "assistant", "content": content}]}])
        with pytest.raises(ValueError, match="row 0 .*: input_key=input: the last message is empty: remove the row"):
            load(path, own, multiturn=multiturn)


def test_a_turn_in_a_column_of_its_own(own: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    whole = load(write_jsonl([{"input": CHAT}]), own)
    apart = load(write_jsonl([{"input": CHAT[:-1], "output": CHAT[-1]["content"]}]), own, output_key="output")
    assert apart.input_ids.tolist() == whole.input_ids.tolist() and trained(apart) == trained(whole)


def test_tokens_do_not_reach_over_a_turns_border(own: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    """ " P" is one token, and the header ends with a space."""
    own.chat_template = PLAIN.replace("<|assistant|>", "<|assistant|> ")
    chat = [
        message
        for answer in ("P", "PP")
        for message in ({"role": "user", "content": "a"}, {"role": "assistant", "content": answer})
    ]
    rows = load(write_jsonl([{"input": chat}]), own)
    tokens, (mask,) = own.convert_ids_to_tokens(rows.input_ids.tolist()), trained(rows)
    said = [token for token, is_trained in zip(tokens, mask, strict=True) if is_trained]
    assert said == ["P", "</s>", "P", "P", "</s>"] and "ĠP" not in tokens
    assert [tokens[index - 1] for index in np.flatnonzero(np.diff(mask) & ~np.array(mask[:-1])) + 1] == ["Ġ", "Ġ"]


def test_a_template_that_rewrites_turns_is_refused_unless_it_marks_them(
    own: PreTrainedTokenizerBase, write_jsonl: Write
) -> None:
    path = write_jsonl([{"input": CHAT[-2:]}, {"input": CHAT}])
    own.chat_template = REWRITING
    with pytest.raises(ValueError, match="row 1 .*renders message 2 otherwise once others follow.*tokenizer_chat"):
        load(path, own)
    own.chat_template = MARKED_REWRITING
    rows = load(path, own)
    text = [spelled(own, ids) for ids in np.split(rows.input_ids, np.cumsum(rows.lengths)[:-1])]
    assert [line.count("thought") for line in text] == [1, 1]
    last, (_, mask) = int(rows.lengths[-1]), trained(rows)
    said = spelled(own, rows.input_ids[-last:][np.array(mask)])
    assert said == "ĠPPĠ</s></s>thoughtĠitĠisĊ42</s>"


def test_chats_that_cannot_be_cut_are_refused(own: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    for chat in (CHAT[:-1], CHAT[-1:], []):
        with pytest.raises(ValueError, match="row 0 .*(ends with the assistant's|neither a string nor a list)"):
            load(write_jsonl([{"input": chat}]), own)
    own.chat_template = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'model'")
    with pytest.raises(ValueError, match="marks nothing in it"):
        load(write_jsonl([{"input": CHAT}]), own)


@pytest.mark.parametrize("kind", ["list", "text", "parquet"])
def test_tools_reach_the_template(own: PreTrainedTokenizerBase, write_jsonl: Write, tmp_path: Path, kind: str) -> None:
    own.chat_template = WITH_TOOLS
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "sub")]
    row = {"input": CHAT[1:3], TOOLS: json.dumps(tools) if kind == "text" else tools}
    path = write_jsonl([row, {"input": CHAT[1:3]}])
    if kind == "parquet":
        tools = [{"type": "function", "function": {"name": name, "strict": True}} for name in ("add", "sub")]
        rows = [row | {TOOLS: tools}, {"input": CHAT[1:3], TOOLS: None}]
        path = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for multiturn in (True, False):
        rows_found = load(path, own, multiturn=multiturn)
        texts = [spelled(own, ids) for ids in np.split(rows_found.input_ids, np.cumsum(rows_found.lengths)[:-1])]
        assert [text.startswith("<add><sub>") for text in texts] == [True, False]


@pytest.mark.parametrize(
    ("template", "tools", "message"),
    [
        (PLAIN, [{"function": {"name": "a"}}], "has tools, which the chat template leaves out"),
        (WITH_TOOLS, "{", "tools holds text that is not JSON"),
        (WITH_TOOLS, ["a"], "tools holds .*not a list of JSON schemas"),
    ],
)
def test_tools_are_not_left_out_in_silence(
    own: PreTrainedTokenizerBase, write_jsonl: Write, template: str, tools: Any, message: str
) -> None:
    own.chat_template = template
    with pytest.raises(ValueError, match=f"row 0 .*{message}"):
        load(write_jsonl([{"input": CHAT[1:3], TOOLS: tools}]), own)
