"""From a row's value to the text that the model reads, and from text to tokens, for prompts and SFT alike."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import numpy as np
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from megarlhf.data.rows import RowErrors, Rows, check_text
from megarlhf.data.types import TokenIds
from megarlhf.formats.json_files import one_line

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Tools = list[Any]  # JSON schemas of functions

TOOLS = "tools"  # column of the functions that a chat's assistant may call
_CHUNK = 2048  # texts that are tokenized at once
_SHOWN_TEXTS = 20_000  # fewer take seconds

_PROBE = "zqprobe"  # text that no template holds by itself
_TEXT_PARTS = ("text", "input_text", "output_text")  # of OpenAI's chat and responses formats
# Templates that print the date get this one, which Llama 3's own fall back on: a run that goes on tomorrow has the same
# prompts.
_DATE = datetime(2024, 7, 26)


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """How values become text: by the tokenizer's chat template, by a format string, or as they are.

    `make_renderer` makes it, with what it finds out about the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    apply_chat_template: bool
    input_template: str | None
    takes_text: bool = True  # the chat template places a message's content where it is a string
    takes_parts: bool = False  # the same for a list of text parts, each of which it places by itself
    _placed_roles: dict[str, bool] = field(default_factory=dict)  # of the roles seen so far

    def prompt(self, value: object, *, tools: Tools | None = None) -> str:
        """The text that the model continues.

        Under the chat template the value is a string (one user message) or a list of messages, and the text ends where
        the assistant begins to speak. Otherwise it is a string, put into `input_template` or taken as it is.

        Raises:
            ValueError: a value of the wrong kind, or a chat that already ends with the assistant's answer.
        """
        if self.apply_chat_template:
            messages = self.messages(value, role="user")
            if messages[-1]["role"] == "assistant":
                raise ValueError("it ends with an assistant message: a prompt ends before the answer, remove it")
            return self.chat(messages, add_generation_prompt=True, tools=tools)
        if not isinstance(value, str):
            kind = type(value).__name__
            raise ValueError(f"its prompt holds a {kind}, not a string: set apply_chat_template for messages")
        check_text(value)
        return value if self.input_template is None else self.input_template.format(value)

    def chat(self, messages: list[Message], *, add_generation_prompt: bool, tools: Tools | None = None) -> str:
        """The text of a chat under the tokenizer's template.

        Args:
            tools: JSON schemas of the functions that the assistant may call, as `row_tools` gives them.
        Raises:
            ValueError: the template refuses these messages, for example for the order of their roles, or leaves tools
                out.
        """
        if tools and not self._places_tools:
            raise ValueError(
                f"it has {TOOLS}, which the chat template leaves out: set tokenizer_chat_template to one with "
                "tools, or remove the column"
            )
        try:
            text = _apply(self.tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools)
        # A template is a program of its author's: it raises whatever Python raises for the values that it meets.
        except Exception as error:
            raise ValueError(f"the chat template refuses it: {one_line(error)}") from error
        check_text(text)
        return text

    def messages(self, value: object, *, role: str) -> list[Message]:
        """A chat as a list of messages that the template can take; a plain string is one message of `role`.

        Fields without a value are left out, for templates ask only whether a field is there; but content without a
        value, which a message with tool calls may have, is there as None.

        Raises:
            ValueError: neither a string nor a list of messages with `role` and `content`, content that is not text, or
                a role that the template leaves out.
        """
        if isinstance(value, str):
            return [{"role": role, "content": self._content(value)}]
        if not isinstance(value, list) or not value:
            raise ValueError(f"it holds {value!r:.100}, neither a string nor a list of messages with role and content")
        return [self._message(message, number) for number, message in enumerate(value)]

    def _message(self, message: object, number: int) -> Message:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"message {number} is {message!r:.100}, not an object with role and content")
        role, content = message["role"], message.get("content")
        if not isinstance(role, str) or not role:
            raise ValueError(f"message {number} has role={role!r:.100}, not a name such as user or assistant")
        if not self._places_role(role):
            raise ValueError(
                f"message {number} has role={role!r}, which the chat template leaves out: rename the role, or set "
                "tokenizer_chat_template to one that has it"
            )
        given = {str(name): value for name, value in message.items() if value is not None}
        if content is None and given.get("tool_calls"):
            return given | {"content": None}
        try:
            return given | {"content": self._content(content)}
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from error

    def _content(self, value: object) -> str | list[dict[str, str]]:
        """Content in the form that the template places."""
        if isinstance(value, str):
            return value if self.takes_text else _as_parts([value])
        if not isinstance(value, list):
            kind = "no value" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"content has {kind}, not a string or a list of text parts")
        texts = [_part_text(part) for part in value]
        return _as_parts(texts) if self.takes_parts else "\n".join(texts)  # vLLM joins with line breaks too

    @cached_property
    def _places_tools(self) -> bool:
        function = {"name": _PROBE, "description": "a", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]
        texts = _probe(self.tokenizer, {"role": "user", "content": self._content("a")}, tools=tools)
        return not texts or any(_PROBE in text for text in texts)

    @cached_property
    def marks_turns(self) -> bool:
        """Whether the chat template marks what the assistant says, with {% generation %}."""
        template = self.tokenizer.get_chat_template() if self.apply_chat_template else ""
        return re.search(r"{%-?\s*generation\s*-?%}", template) is not None

    def marked_turns(self, messages: list[Message], *, tools: Tools | None) -> tuple[str, list[tuple[int, int]]]:
        """A chat's text, and the (start, end) in it of each part that the template marks as the assistant's."""
        text = self.chat(messages, add_generation_prompt=False, tools=tools)
        render: Any = render_jinja_template  # declared to return a string
        texts, spans = render(
            [messages],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            strftime_now=_DATE.strftime,
            **self.tokenizer.special_tokens_map,
        )
        assert texts == [text], "Transformers renders a chat in one way"
        return text, list(spans[0])

    def _places_role(self, role: str) -> bool:
        if role not in self._placed_roles:
            texts = _probe(self.tokenizer, {"role": role, "content": self._content(_PROBE)})
            self._placed_roles[role] = not texts or any(_PROBE in text for text in texts)
        return self._placed_roles[role]


def make_renderer(
    tokenizer: PreTrainedTokenizerBase, *, apply_chat_template: bool, input_template: str | None
) -> Renderer:
    """Find out what the chat template takes.

    Args:
        input_template: format string with one {}, and only without apply_chat_template, as config/checks.py has seen.
    Raises:
        ValueError: a chat template that the tokenizer lacks, or that does not place its input.
    """
    plain = Renderer(tokenizer=tokenizer, apply_chat_template=apply_chat_template, input_template=input_template)
    if not apply_chat_template:
        if input_template is not None and "\\n" in input_template:
            logger.warning(
                "input_template=%r holds a backslash and an n, not a line break: in bash $'...' makes line breaks",
                input_template,
            )
        return plain
    if tokenizer.chat_template is None:
        raise ValueError(
            f"apply_chat_template=True, but tokenizer={tokenizer.name_or_path} has no chat template: "
            "set tokenizer_chat_template, or use input_template"
        )
    of_text = _probe(tokenizer, {"role": "user", "content": _PROBE})
    of_parts = _probe(tokenizer, {"role": "user", "content": _as_parts([_PROBE])})
    takes_text = any(_PROBE in text for text in of_text)
    # A template that does not know parts prints the list as Python does, and so another text.
    takes_parts = any(_PROBE in text for text in of_parts) and (of_parts == of_text or not takes_text)
    if of_text and not takes_text and not takes_parts:
        raise ValueError(
            f"tokenizer_chat_template, or the chat template of tokenizer={tokenizer.name_or_path} where that is unset, "
            f"does not place a message's content (it makes {of_text[0]!r:.100} of any): every prompt would be the same"
        )
    return replace(plain, takes_text=takes_text or not takes_parts, takes_parts=takes_parts)


def row_tools(rows: Rows, index: int) -> Tools | None:
    """The functions that the assistant of a row's chat may call: JSON schemas, or JSON text of them; None: none.

    Raises:
        ValueError: neither.
    """
    value = rows.rows[index].get(TOOLS)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{TOOLS} holds text that is not JSON ({error})") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{TOOLS} holds {value!r:.100}, not a list of JSON schemas of functions")
    return value


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool,
    tools: Tools | None = None,
) -> str:
    text = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        strftime_now=_DATE.strftime,
    )
    assert isinstance(text, str)
    return text


def _probe(tokenizer: PreTrainedTokenizerBase, message: Message, *, tools: Tools | None = None) -> list[str]:
    """The texts that the template makes of chats with this message; none where it refuses them all.

    Templates differ in which roles may come first, and which may follow.

    Raises:
        ValueError: the template is not valid Jinja.
    """
    parts = isinstance(message["content"], list)
    content = _as_parts(["a"]) if parts else "a"
    user, assistant, system = [{"role": role, "content": content} for role in ("user", "assistant", "system")]
    calls = [{"type": "function", "id": "a" * 9, "function": {"name": "a", "arguments": {}}}]
    answer = message | {"name": "a", "tool_call_id": "a" * 9}  # of a tool that was called, in the role tool
    chats = [[message], [message, user], [system, message], [user, message], [user, assistant, message]]
    chats.append([user, assistant | {"tool_calls": calls}, answer])
    texts = []
    for chat in chats:
        try:
            texts.append(_apply(tokenizer, chat, add_generation_prompt=True, tools=tools))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"tokenizer_chat_template, or the chat template of tokenizer={tokenizer.name_or_path} where that is "
                f"unset, is not valid Jinja: {error}"
            ) from error
        except Exception:
            continue  # what it raises for a row is told with the row
    return texts


def _as_parts(texts: list[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _part_text(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"content has the part {part!r:.100}; the model reads text, as {{'type': 'text', 'text': '...'}}")


def encode_arrays(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, rows: Rows, owners: Sequence[int] | None = None
) -> list[TokenIds]:
    """Token ids of each row's text, with nothing added before or after; a terminal shows the progress of large data.

    The tokenizers library works on all cores, one text on each.

    Args:
        owners: index of the row that each text is of; None: one text for each row.
    Raises:
        ValueError: texts that the tokenizer fails at, with the places of their rows.
    """
    encoded: list[TokenIds] = []
    console = Console(stderr=True)
    hidden = len(texts) < _SHOWN_TEXTS or not console.is_terminal
    try:
        for start in track(range(0, len(texts), _CHUNK), "tokenizing", console=console, transient=True, disable=hidden):
            found = _encode(tokenizer, list(texts[start : start + _CHUNK]))
            encoded += [np.asarray(ids, dtype=np.int32) for ids in found]
    except ValueError:
        errors = RowErrors(rows.path)
        for text, owner in zip(texts, range(len(texts)) if owners is None else owners, strict=True):
            try:
                _encode(tokenizer, [text])
            except ValueError as error:
                errors.add(f"{rows.place(owner)}: {error}")
        errors.raise_if_any()
        raise
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    try:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    except (KeyboardInterrupt, SystemExit):
        raise
    # The Rust library raises a bare Exception for what its model does not know, and a panic of it is a BaseException.
    except BaseException as error:
        raise ValueError(f"tokenizer={tokenizer.name_or_path} fails at it: {one_line(error)}") from error
    return ids


def encode_prompts(
    renderer: Renderer, texts: Sequence[str], *, rows: Rows, owners: Sequence[int] | None = None
) -> list[TokenIds]:
    """Token ids of texts as the start of a sequence; `owners` as for `encode_arrays`.

    The text of a chat template already holds BOS where the model wants one. Other text gets what the tokenizer puts
    before a sequence; what it puts after one, EOS, would end the prompt and is left out.
    """
    encoded = encode_arrays(renderer.tokenizer, texts, rows=rows, owners=owners)
    prefix = np.array([] if renderer.apply_chat_template else special_prefix(renderer.tokenizer), dtype=np.int32)
    return [ids if np.array_equal(ids[: len(prefix)], prefix) else np.concatenate([prefix, ids]) for ids in encoded]


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every sequence."""
    plain = _encode(tokenizer, ["a"])[0]
    full: list[int] = tokenizer.encode("a", add_special_tokens=True)
    starts = [start for start in range(len(full)) if full[start : start + len(plain)] == plain]
    return full[: starts[0]] if plain and starts else []
