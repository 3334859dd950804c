"""Rows for supervised fine-tuning: prompt and answer in tokens, with the loss on the answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarlhf.data.loading import load_rows
from megarlhf.data.templates import (
    as_messages,
    check_template,
    column,
    encode,
    encode_prompts,
    render_chat,
    render_prompt,
)
from megarlhf.data.types import TrainingRow


@dataclass(frozen=True, kw_only=True)
class SFTData:
    """Rows that fit, and how many did not."""

    rows: list[TrainingRow]
    num_dropped: int  # rows longer than max_len


def load_sft_rows(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    input_key: str,
    output_key: str | None,
    apply_chat_template: bool,
    input_template: str | None,
    max_len: int,
    pretrain_mode: bool,
    max_samples: int | None,
) -> SFTData:
    """Read, render and tokenize a supervised data file.

    Every row ends with one EOS. `prompt_length` is the number of prompt tokens, so the targets are the answer's
    tokens and the EOS; with `pretrain_mode` it is 1 and everything after the first token is a target. The prompt's
    tokens are those that generation starts from.

    Args:
        path: as for `load_rows`.
        input_key: column of the prompt; without `output_key`, of a whole chat.
        output_key: column of the answer: a string, or with `apply_chat_template` also a list of messages. None:
            `input_key` holds a list of messages that ends with the assistant's, and the loss is on that last turn
            only, not on earlier assistant turns; or, with `pretrain_mode` and no chat template, a plain text.
        apply_chat_template: render with the tokenizer's template.
        input_template: format string with one {} for the prompt; None takes the text as it is.
        max_len: longest row in tokens, EOS included; longer ones are dropped, never cut, and counted.
        pretrain_mode: loss on the prompt too.
        max_samples: read only the first so many rows; None reads all.
    Returns:
        Rows whose group_id is their place in the file, with no fields.
    Raises:
        ValueError: a missing or empty value, settings that do not fit together, or every row too long.
    """
    check_template(tokenizer, apply_chat_template=apply_chat_template, input_template=input_template)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={tokenizer.name_or_path} has no EOS: a model trained without one never stops")
    if output_key is None and not apply_chat_template and not pretrain_mode:
        raise ValueError(
            f"output_key=None means that input_key={input_key} holds whole chats: set apply_chat_template, or "
            "output_key for the answer, or pretrain_mode for plain text"
        )
    rows = load_rows(path)
    num_rows = len(rows) if max_samples is None else min(len(rows), max_samples)
    pairs = [
        _render_row(
            tokenizer,
            rows[index],
            input_key=input_key,
            output_key=output_key,
            apply_chat_template=apply_chat_template,
            input_template=input_template,
            place=f"row {index} of {path}",
        )
        for index in range(num_rows)
    ]
    kept = []
    encoded = _encode_pairs(tokenizer, pairs, apply_chat_template=apply_chat_template)
    for index, (prompt_ids, response_ids) in enumerate(encoded):
        input_ids = (*prompt_ids, *response_ids)
        prompt_length = 1 if pretrain_mode else len(prompt_ids)
        if not 1 <= prompt_length < len(input_ids):
            raise ValueError(f"input_key={input_key} is empty in row {index} of {path}: remove it")
        if len(input_ids) <= max_len:
            kept.append(TrainingRow(input_ids=input_ids, prompt_length=prompt_length, group_id=index))
    if not kept:
        shortest = min(len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in encoded)
        raise ValueError(
            f"max_len={max_len} drops all {num_rows} rows of {path}, the shortest of which has {shortest} tokens: "
            "raise max_len"
        )
    return SFTData(rows=kept, num_dropped=num_rows - len(kept))


def _render_row(
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, Any],
    *,
    input_key: str,
    output_key: str | None,
    apply_chat_template: bool,
    input_template: str | None,
    place: str,
) -> tuple[str, str]:
    """Prompt and response of a row as text."""
    prompt = column(row, input_key, option="input_key", place=place)
    response = None if output_key is None else column(row, output_key, option="output_key", place=place)
    if apply_chat_template:
        return _render_chat_row(tokenizer, prompt, response, place=place)
    if response is None:
        response = ""
    elif not isinstance(response, str):
        raise ValueError(f"{place}: output_key={output_key} holds a {type(response).__name__}, not a string")
    text = render_prompt(tokenizer, prompt, apply_chat_template=False, input_template=input_template, place=place)
    return text, response


def _render_chat_row(
    tokenizer: PreTrainedTokenizerBase, prompt: object, response: object | None, *, place: str
) -> tuple[str, str]:
    messages = as_messages(prompt, role="user", place=place)
    if response is None:
        messages, answer = messages[:-1], messages[-1:]
        if not messages or answer[0]["role"] != "assistant":
            raise ValueError(f"{place}: a whole chat ends with the assistant's message, after at least one other")
    else:
        answer = as_messages(response, role="assistant", place=place)
    before = render_chat(tokenizer, messages, add_generation_prompt=True, place=place)
    whole = render_chat(tokenizer, messages + answer, add_generation_prompt=False, place=place)
    if not whole.startswith(before):
        raise ValueError(
            f"apply_chat_template=True: the rendered chat of {place} does not begin with its rendered prompt, so the "
            "answer's tokens cannot be told apart: set tokenizer_chat_template to one that only appends"
        )
    # Templates put a line break after the token that ends the turn; generation has stopped before it.
    return before, whole[len(before) :].rstrip()


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], *, apply_chat_template: bool
) -> list[tuple[list[int], list[int]]]:
    """Tokens of each prompt and of its response, which ends with one EOS.

    Prompt and response are tokenized as one text where that begins with the prompt's own tokens, and apart where a
    token would reach over the border: generation starts from the prompt's own tokens.
    """
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in pairs], apply_chat_template=apply_chat_template)
    joint = encode_prompts(tokenizer, [a + b for a, b in pairs], apply_chat_template=apply_chat_template)
    apart = encode(tokenizer, [response for _, response in pairs])
    encoded = []
    for prompt_ids, whole, alone in zip(prompts, joint, apart, strict=True):
        response = whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else list(alone)
        while response and response[-1] == tokenizer.eos_token_id:
            response.pop()
        encoded.append((prompt_ids, [*response, int(tokenizer.eos_token_id)]))
    return encoded
