"""Prompts: the text that is rendered, the tokens it becomes, what is dropped, and the order of drawing."""

import json
from collections import Counter
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from megarlhf.data.prompts import PromptData, load_prompts
from megarlhf.data.sampling import PromptSampler

Write = Callable[[list[Any]], str]


def load(path: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PromptData:
    settings: dict[str, Any] = {
        "input_key": "input",
        "label_key": "label",
        "apply_chat_template": False,
        "input_template": None,
        "prompt_max_len": 100,
        "max_samples": None,
        "vocab_size": 1000,
    }
    return load_prompts(path, tokenizer, **(settings | changes))


def test_plain_text_gets_bos_but_no_eos(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(write_jsonl([{"input": "ab", "label": 7}, {"input": "<s>c"}]), tokenizer)
    first, second = data.prompts
    assert (first.index, first.text, first.label) == (0, "ab", 7)
    assert tokenizer.convert_ids_to_tokens(first.token_ids.tolist()) == ["<s>", "a", "b"]
    assert tokenizer.convert_ids_to_tokens(second.token_ids.tolist()) == ["<s>", "c"]
    assert first.token_ids.dtype == np.int32
    assert second.label is None


def test_input_template_and_chat_template(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "{y}", "name": None}]
    path = write_jsonl([{"input": "{x}"}])
    assert load(path, tokenizer, input_template="U: {}\nA: ").prompts[0].text == "U: {x}\nA: "
    chat = load(write_jsonl([{"input": "x"}, {"input": messages}]), tokenizer, apply_chat_template=True).prompts
    assert [prompt.text for prompt in chat] == [
        "<s><|user|>x</s>\n<|assistant|>",
        "<s><|user|>{y}</s>\n<|assistant|>",
    ]
    assert Counter(chat[0].token_ids.tolist())[0] == 1, "one BOS, the template's own"


def test_long_prompts_are_dropped_and_counted(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl([{"input": "a" * length} for length in (3, 4, 5, 1)])
    data = load(path, tokenizer, prompt_max_len=4)  # with BOS: 4, 5, 6, 2 tokens
    assert ([prompt.index for prompt in data.prompts], data.num_dropped) == ([0, 3], 2)
    data = load(path, tokenizer, prompt_max_len=4, max_samples=2)
    assert ([prompt.index for prompt in data.prompts], data.num_dropped) == ([0], 1)
    with pytest.raises(ValueError, match=r"prompt_max_len=1 drops all 4 rows .* 2 tokens"):
        load(path, tokenizer, prompt_max_len=1)


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"text": "a"}, {}, r"row 0 \(line 1\) of .*: input_key=input is not there; the keys are 'text'"),
        ({"input": None}, {}, r"row 0 \(line 1\) of .*: input_key=input has no value"),
        ({"input": ["a"]}, {}, "holds a list, not a string"),
        ({"input": ["a"]}, {"apply_chat_template": True}, "message 0 is 'a', not an object"),
        ({"input": 3}, {"apply_chat_template": True}, "neither a string nor a list of messages"),
        ({"input": [{"role": "assistant", "content": "a"}]}, {"apply_chat_template": True}, "ends with an assistant"),
        ({"input": "a", "label": 1}, {"label_key": "answer", "needs_label": True}, "label_key=answer is in no row of"),
    ],
)
def test_bad_rows_and_settings_are_refused(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(write_jsonl([row]), tokenizer, **changes)


def test_chat_template_must_exist_and_may_refuse(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl([{"input": "a"}])
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no users') }}")
    with pytest.raises(ValueError, match="row 0 .* the chat template refuses it: TemplateError: no users"):
        load(path, tokenizer, apply_chat_template=True)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="set tokenizer_chat_template"):
        load(path, tokenizer, apply_chat_template=True)


LABELS = [7, 7.5, "007", True, None, [1, "a", None], {"low": 1, "high": None}, "", 10**30]


def test_labels_keep_their_type_and_nan_is_no_label(write_jsonl: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    labels = [*LABELS, float("nan"), [1.5, float("nan")]]
    path = write_jsonl([{"input": "a", "label": label} for label in labels])
    loaded = [prompt.label for prompt in load(path, tokenizer).prompts]
    wanted = [*LABELS, None, [1.5, None]]
    assert [(label, type(label)) for label in loaded] == [(label, type(label)) for label in wanted]
    assert json.loads(json.dumps(loaded)) == wanted, "samples cross to the reward code as JSON"


ARROW_LABELS: list[tuple[Any, Any, Any]] = [
    (pyarrow.float64(), float("nan"), None),
    (pyarrow.int8(), 3, 3),
    (pyarrow.float16(), np.float16(1.5), 1.5),
    (pyarrow.bool_(), True, True),
    (pyarrow.decimal128(10, 2), Decimal("12.50"), "12.50"),
    (pyarrow.date32(), date(2024, 7, 26), "2024-07-26"),
    (pyarrow.timestamp("s"), datetime(2024, 7, 26, 1), "2024-07-26 01:00:00"),
    (pyarrow.list_(pyarrow.float32()), [0.5, None], [0.5, None]),
    (pyarrow.map_(pyarrow.string(), pyarrow.int64()), [("a", 1), ("b", None)], {"a": 1, "b": None}),
    (pyarrow.struct({"a": pyarrow.int64(), "b": pyarrow.string()}), {"a": 1}, {"a": 1}),
    (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "x", "x"),
]


@pytest.mark.parametrize(("kind", "value", "wanted"), ARROW_LABELS, ids=lambda value: str(value))
def test_labels_of_arrow_become_plain_json(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: pyarrow.DataType, value: Any, wanted: Any
) -> None:
    table = pyarrow.table({"input": ["a", "b"], "label": pyarrow.array([value, None], type=kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = load(str(tmp_path / "a.parquet"), tokenizer).prompts
    assert (first.label, type(first.label), second.label) == (wanted, type(wanted), None)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (pyarrow.binary(), b"x", "label_key=label: it holds a bytes"),
        (pyarrow.duration("s"), timedelta(seconds=1), "label_key=label: it holds a timedelta"),
        (pyarrow.float64(), float("-inf"), "label_key=label: it holds -inf"),
        (
            pyarrow.map_(pyarrow.int64(), pyarrow.int64()),
            [(1, 2)],
            "label_key=label: it holds an object with the key 1",
        ),
    ],
)
def test_labels_that_json_has_no_form_for_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: pyarrow.DataType, value: Any, said: str
) -> None:
    table = pyarrow.table({"input": ["a", "b"], "label": pyarrow.array([None, value], type=kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"^row 1 of {tmp_path / 'a.parquet'}: {said}"):
        load(str(tmp_path / "a.parquet"), tokenizer)


def test_labels_of_csv_stay_strings(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.csv").write_text("input,label\na,007\nb,nan\n")
    assert [prompt.label for prompt in load(str(tmp_path / "a.csv"), tokenizer).prompts] == ["007", "nan"]


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 5))
def test_each_epoch_draws_each_prompt_once(num_prompts: int, batch_size: int, seed: int) -> None:
    sampler = PromptSampler(num_prompts, batch_size, seed)
    num_steps = -(-3 * num_prompts // batch_size)
    batches = [sampler.batch(step) for step in range(num_steps)]
    assert all(len(batch) == batch_size for batch in batches)
    line = [index for batch in batches for index in batch]
    for epoch in range(3):
        assert sorted(line[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(range(num_prompts))
    assert PromptSampler(num_prompts, batch_size, seed).batch(num_steps - 1) == batches[-1]
    assert sampler.epoch(num_steps) == len(line) / num_prompts


@given(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 5))
def test_a_run_that_continues_with_another_batch_size_goes_on_where_it_was(
    num_rows: int, sizes: list[int], seed: int
) -> None:
    line, step, consumed = [], 3, 0
    for size in sizes:  # each start makes two steps
        sampler = PromptSampler(num_rows, size, seed, first_step=step, consumed=consumed)
        line += sampler.batch(step) + sampler.batch(step + 1)
        step, consumed = step + 2, sampler.consumed(step + 2)
        assert consumed == len(line) and sampler.epoch(step) == len(line) / num_rows
    assert line == PromptSampler(num_rows, len(line), seed).batch(0)


def test_order_depends_on_seed_and_epoch() -> None:
    first = PromptSampler(50, 50, 0)
    assert first.batch(0) != first.batch(1)
    assert first.batch(0) != PromptSampler(50, 50, 7).batch(0)
    with pytest.raises(AssertionError, match="a batch of 0 out of 5 rows"):
        PromptSampler(5, 0, 0)
