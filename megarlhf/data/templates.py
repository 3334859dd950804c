"""From a row's value to the text that the model reads, and from text to tokens, for prompts and SFT alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


def check_template(
    tokenizer: PreTrainedTokenizerBase, *, apply_chat_template: bool, input_template: str | None
) -> None:
    """Refuse template settings that cannot work or that would be ignored.

    Raises:
        ValueError: both kinds of template, a chat template that the tokenizer lacks, or an input template that does
            not place its input.
    """
    if apply_chat_template and input_template is not None:
        raise ValueError(
            f"apply_chat_template=True and input_template={input_template!r}; one of them renders a prompt: unset one"
        )
    if apply_chat_template and tokenizer.chat_template is None:
        raise ValueError(
            f"apply_chat_template=True, but tokenizer={tokenizer.name_or_path} has no chat template: "
            "set tokenizer_chat_template, or use input_template"
        )
    if input_template is not None:
        try:
            placed = "probe" in input_template.format("probe")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"input_template={input_template!r} is not a format string: {error!r}; double other braces"
            ) from error
        if not placed:
            raise ValueError(
                f"input_template={input_template!r} has no {{}} for the input: every prompt would be the same"
            )


def column(row: Mapping[str, object], key: str, *, option: str, place: str) -> object:
    """The value of a row's column.

    Args:
        option: name of the setting that holds `key`, for the message.
        place: where the row is, for the message.
    Raises:
        ValueError: the row lacks the column or has no value there.
    """
    if key not in row:
        raise ValueError(f"{option}={key} is not in {place}; its keys are {', '.join(map(repr, row))}: set {option}")
    if row[key] is None:
        raise ValueError(f"{option}={key} has no value in {place}: remove the row")
    return row[key]


def as_messages(value: object, *, role: str, place: str) -> list[Message]:
    """A chat as a list of messages; a plain string is one message of `role`.

    Fields without a value are left out: Parquet gives every message all fields that any message has, and templates
    ask only whether a field is there.

    Raises:
        ValueError: neither a string nor a list of messages with `role` and `content`.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        return [{name: field for name, field in message.items() if field is not None} for message in value]
    raise ValueError(f"{place} holds {value!r:.100}, neither a string nor a list of messages with 'role' and 'content'")


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, add_generation_prompt: bool, place: str
) -> str:
    """The text of a chat under the tokenizer's template.

    Raises:
        ValueError: the template refuses these messages, for example for the order of their roles.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise ValueError(f"apply_chat_template=True: the chat template refuses {place}: {error}") from error
    assert isinstance(text, str)
    return text


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    value: object,
    *,
    apply_chat_template: bool,
    input_template: str | None,
    place: str,
) -> str:
    """The text that the model continues.

    Under the chat template the value is a string (one user message) or a list of messages, and the text ends where
    the assistant begins to speak. Otherwise it is a string, put into `input_template` or taken as it is.

    Raises:
        ValueError: a value of the wrong kind, or a chat that already ends with the assistant's answer.
    """
    if apply_chat_template:
        messages = as_messages(value, role="user", place=place)
        if messages[-1]["role"] == "assistant":
            raise ValueError(f"{place} ends with an assistant message: a prompt ends before the answer, remove it")
        return render_chat(tokenizer, messages, add_generation_prompt=True, place=place)
    if not isinstance(value, str):
        raise ValueError(f"{place} holds a {type(value).__name__}, not a string: set apply_chat_template for messages")
    return value if input_template is None else input_template.format(value)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added before or after."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, apply_chat_template: bool
) -> list[list[int]]:
    """Token ids of each text as the start of a sequence.

    The text of a chat template already holds BOS where the model wants one. Other text gets what the tokenizer puts
    before a sequence; what it puts after one, EOS, would end the prompt and is left out.
    """
    encoded = encode(tokenizer, texts)
    prefix = [] if apply_chat_template else _special_prefix(tokenizer)
    return [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in encoded]


def _special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    plain: list[int] = tokenizer.encode("a", add_special_tokens=False)
    full: list[int] = tokenizer.encode("a", add_special_tokens=True)
    starts = [start for start in range(len(full)) if full[start : start + len(plain)] == plain]
    return full[: starts[0]] if plain and starts else []
