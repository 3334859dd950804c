"""What rows may hold, and what templates and tokenizers make of it: what they raise comes back with file and row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megarlhf.data.prompts import load_prompts
from megarlhf.data.sft import load_sft_rows
from megarlhf.data.templates import Renderer, make_renderer
from tests.data.rows import load_with

Write = Callable[[list[Any]], str]

QWEN = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
LLAMA3 = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] | trim) + '</s>' }}{% endfor %}"
GEMMA3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>{% endfor %}"
)
PARTS_ONLY = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
)
# As Qwen 2.5's: roles that it does not know are left out without a word.
KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def renderer(tokenizer: PreTrainedTokenizerBase, template: str) -> Renderer:
    tokenizer.chat_template = template
    return make_renderer(tokenizer, apply_chat_template=True, input_template=None)


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    """The tokenizer, whose template a test may set."""
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template)
    return tokenizer


def prompts(path: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "input_key": "input",
        "label_key": "label",
        "apply_chat_template": True,
        "input_template": None,
        "prompt_max_len": 1000,
        "max_samples": None,
        "vocab_size": 1000,
    }
    return [prompt.text for prompt in load_prompts(path, tokenizer, **(settings | changes)).prompts]


def refused(path: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        prompts(path, tokenizer, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("template", "joined"),
    [(QWEN, "a\nb"), (LLAMA3, "a\nb"), (GEMMA3, "ab"), (PARTS_ONLY, "ab")],
    ids=["qwen", "llama3", "gemma3", "parts_only"],
)
def test_text_parts_are_read_as_the_template_can(
    own: PreTrainedTokenizerBase, write_jsonl: Write, template: str, joined: str
) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    path = write_jsonl([{"input": [{"role": "user", "content": content}]} for content in (parts, ["hi"], "hi", [])])
    own.chat_template = template
    wanted = [f"<|user|>{text}</s>" for text in (joined, "hi", "hi", "")]
    assert prompts(path, own) == wanted
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
    path, keys = write_jsonl([{"input": chat}]), {"input_key": "input", "output_key": None}
    rows = load_with(
        load_sft_rows, path, own, **keys, apply_chat_template=True, pretrain_mode=False, multiturn=False
    ).rows
    assert (
        "".join(own.convert_ids_to_tokens(rows.input_ids.tolist())).replace("Ċ", "\n")
        == f"<|user|>{joined}</s><|assistant|>c</s>"
    )


def test_nulls_that_parquet_adds_to_parts_do_not_reach_the_template(
    own: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    user = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "x"}}}]}
    other = {"role": "user", "content": [{"type": "text", "text": "b", "n": 1}], "name": "n"}
    unit = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"unit": "c"}}}]}
    chats = [[user, call, user], [user, unit, other]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"input": c} for c in chats]), tmp_path / "a.parquet")
    own.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.content is none }}{{ m.tool_calls | tojson }}{% else %}"
        "{{ m['content'] }}{% endif %}|{% endfor %}"
    )
    assert prompts(str(tmp_path / "a.parquet"), own) == [
        'hi|True[{"function": {"name": "f", "arguments": {"city": "x"}}}]|hi|',
        'hi|True[{"function": {"name": "g", "arguments": {"unit": "c"}}}]|b|',
    ]


def test_nulls_that_json_has_inside_a_field_stay(own: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    calls = [{"function": {"name": "f", "arguments": {"city": None}}}]
    chat = [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "user", "content": "a", "name": None}]
    own.chat_template = "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else m | tojson }}{% endfor %}"
    said = '[{"function": {"name": "f", "arguments": {"city": null}}}]{"role": "user", "content": "a"}'
    assert prompts(write_jsonl([{"input": chat}]), own) == [said]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": 3}, "message 1: content has a int, not a string or a list of text parts"),
        ({"role": "user", "content": True}, "message 1: content has a bool"),
        ({"role": "user", "content": {"text": "a"}}, "message 1: content has a dict"),
        ({"role": "user", "content": None}, "message 1: content has no value"),
        ({"role": "user"}, "message 1: content has no value"),
        ({"role": "user", "tool_calls": []}, "message 1: content has no value"),
        ({"role": "user", "content": [IMAGE]}, "message 1: content has the part {'type': 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "message 1: content has the part {'type': 'text'}"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "message 1: content has the part"),
        ({"role": "user", "content": [None]}, "message 1: content has the part None"),
        ({"role": None, "content": "a"}, "message 1 has role=None, not a name"),
        ({"role": 7, "content": "a"}, "message 1 has role=7, not a name"),
        ({"role": ["user"], "content": "a"}, "message 1 has role=['user'], not a name"),
        ({"role": "", "content": "a"}, "message 1 has role='', not a name"),
        ({"content": "a"}, "message 1 is {'content': 'a'}, not an object with role and content"),
        ({"from": "human", "value": "a"}, "message 1 is {'from': 'human'"),
        ("a", "message 1 is 'a', not an object with role and content"),
        (None, "message 1 is None, not an object with role and content"),
        ([], "message 1 is [], not an object with role and content"),
    ],
)
def test_a_message_that_is_none_is_refused_with_file_and_line(
    tokenizer: PreTrainedTokenizerBase, write_jsonl: Write, message: object, said: str
) -> None:
    good = {"role": "user", "content": "a"}
    path = write_jsonl([{"input": "fine"}, {"input": [good, message, good]}])
    assert refused(path, tokenizer).startswith(f"row 1 (line 2) of {path}: {said}")


def test_bad_rows_come_together_the_first_five_in_words(tokenizer: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    path = write_jsonl([{"input": value} for value in ("a", 1, [], "b", None, {}, 2.5, 3, 4)])
    lines = refused(path, tokenizer).splitlines()
    assert [line.split(" of ")[0] for line in lines[:-1]] == [f"row {i} (line {i + 1})" for i in (1, 2, 4, 5, 6)]
    assert lines[-1] == f"{path}: 2 more rows cannot be used either"


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("raise_exception('roles must alternate')", "TemplateError: roles must alternate"),
        ("m['content'] + 1", "TypeError: "),
        ("m.nothing.more", "UndefinedError: "),
        ("1 // (m['content'] | length - 3)", "ZeroDivisionError: "),
        ("m['content'].__class__.mro()", "SecurityError: "),
        ("m['content'] | int // 0", "ZeroDivisionError: "),
        ("range(999999) | list", "OverflowError: "),
        ("m['content'].missing()", "UndefinedError: "),
        ("{}[m['content']]['x']", "UndefinedError: "),
        ("m['content'].index('#')", "ValueError: "),
        ("dive(dive)", "RecursionError: "),
    ],
)
def test_whatever_a_template_raises_names_file_and_row(
    own: PreTrainedTokenizerBase, write_jsonl: Write, expression: str, said: str
) -> None:
    own.chat_template = (
        "{% macro dive(f) %}{{ f(f) }}{% endmacro %}{% for m in messages %}{{ m['content'] }}"
        "{% if m['content'] == 'bad' %}{{ " + expression + " }}{% endif %}{% endfor %}"
    )
    path = write_jsonl([{"input": "good"}, {"input": "bad"}])
    assert refused(path, own).startswith(f"row 1 (line 2) of {path}: the chat template refuses it: {said}")


def test_a_role_that_the_template_leaves_out_is_refused(own: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    own.chat_template = KNOWN_ROLES
    path = write_jsonl([{"input": [{"role": "human", "content": "a"}, {"role": "user", "content": "b"}]}])
    assert "message 0 has role='human', which the chat template leaves out" in refused(path, own)
    own.chat_template = QWEN
    assert prompts(path, own) == ["<|human|>a</s><|user|>b</s>"]


def test_a_role_that_the_template_has_only_after_a_tool_call_is_taken(
    own: PreTrainedTokenizerBase, write_jsonl: Write
) -> None:
    """As Gemma 4's, which writes what a tool answered where it was called."""
    own.chat_template = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content or '' }}{% if m.tool_calls %}"
        "[{{ messages[loop.index].content }}]{% endif %}{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    path = write_jsonl([{"input": [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "b"}]}])
    assert prompts(path, own) == ["a[b]"]


@pytest.mark.parametrize(
    "template",
    ["mine.jinja", "{{ messages[0]['role'] }}", "{% for m in messages %}{{ m.text }}{% endfor %}", ""],
)
def test_a_template_that_does_not_place_the_content_is_refused(own: PreTrainedTokenizerBase, template: str) -> None:
    with pytest.raises(ValueError, match="does not place a message's content"):
        renderer(own, template)


def test_a_template_with_a_mistake_in_its_syntax_is_refused(own: PreTrainedTokenizerBase) -> None:
    for template in ("{% for %}", "{{ messages | nothing }}"):
        with pytest.raises(ValueError, match="is not valid Jinja"):
            renderer(own, template)


def test_a_template_with_the_date_makes_the_same_prompt_every_day(own: PreTrainedTokenizerBase) -> None:
    """With the clock's date a run that goes on tomorrow would find other data than its checkpoint was made with."""
    made = renderer(own, "{{ strftime_now('%d %b %Y') }} " + QWEN)
    assert made.prompt("a") == "26 Jul 2024 <|user|>a</s>"


SURROGATES = [
    {"input": "cut \ud83d here"},
    {"input": [{"role": "user", "content": "\ude00"}]},
    {"input": [{"role": "\ud83d", "content": "a"}]},
    {"input": [{"role": "user", "content": [{"type": "text", "text": "\udc00\ud800"}]}]},
    {"input": "a", "label": "\udfff"},
    {"input": "a", "label": {"x": ["\ud83d"]}},
]


@pytest.mark.parametrize("row", SURROGATES)
@pytest.mark.parametrize("chat", [True, False])
def test_half_a_surrogate_pair_is_refused(
    tokenizer: PreTrainedTokenizerBase, write_jsonl: Write, row: dict[str, Any], chat: bool
) -> None:
    path = write_jsonl([{"input": "\U0001f600", "label": "\U0001f600"}, row])
    said = refused(path, tokenizer, apply_chat_template=chat)
    assert said.startswith(f"row 1 (line 2) of {path}: ")
    assert "half of a surrogate pair" in said or (not chat and "holds a list, not a string" in said)


def test_half_a_surrogate_pair_in_an_answer_is_refused(tokenizer: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    path = write_jsonl([{"input": "a", "output": "b"}, {"input": "a", "output": "\ud83d"}])
    for chat in (True, False):
        with pytest.raises(ValueError, match=r"row 1 \(line 2\) of .*half of a surrogate pair"):
            load_with(
                load_sft_rows,
                path,
                tokenizer,
                input_key="input",
                output_key="output",
                apply_chat_template=chat,
                pretrain_mode=False,
                multiturn=False,
            )


def test_characters_that_only_look_odd_pass(tokenizer: PreTrainedTokenizerBase, write_jsonl: Write) -> None:
    odd = "\x00a\x1b\ufeff\ufffe\u2028\U0010ffff\r"
    assert prompts(write_jsonl([{"input": odd}]), tokenizer, apply_chat_template=False) == [odd]


def test_what_the_tokenizer_fails_at_names_file_and_row(write_jsonl: Write) -> None:
    backend = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1}, unk_token="none"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend)
    path = write_jsonl([{"input": "a b"}, {"input": "a c"}, {"input": "b"}, {"input": "d"}])
    said = refused(path, words, apply_chat_template=False).splitlines()
    assert [line.split(" of ")[0] for line in said] == ["row 1 (line 2)", "row 3 (line 4)"]
    assert "fails at it: Exception: WordLevel error" in said[0]


def test_a_backslash_in_an_input_template_is_pointed_out(
    tokenizer: PreTrainedTokenizerBase, write_jsonl: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl([{"input": "a"}])
    assert prompts(path, tokenizer, apply_chat_template=False, input_template="{}\nA:") == ["a\nA:"]
    assert not caplog.records
    assert prompts(path, tokenizer, apply_chat_template=False, input_template=r"{}\nA:") == [r"a\nA:"]
    assert "not a line break" in caplog.text


def test_rows_are_written_as_json_writes_them(write_jsonl: Write) -> None:
    """The surrogates above reach the file as escapes, as scraped chats have them."""
    assert json.dumps(SURROGATES[0]) in Path(write_jsonl([SURROGATES[0]])).read_text()
