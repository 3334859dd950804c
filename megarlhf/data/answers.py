"""A prompt and its answer in text and in tokens, for all supervised data."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.rows import Rows, check_text
from megarlhf.data.templates import Renderer, Tools, encode_arrays, prompt_arrays
from megarlhf.data.turns import last_turn
from megarlhf.data.types import TokenIds


def check_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that has no token to end an answer with.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={tokenizer.name_or_path} has no EOS: a model trained without one never stops")


def render_answer(
    renderer: Renderer, prompt: object | None, answer: object, option: str, *, tools: Tools | None
) -> list[str]:
    """Text of a prompt and of the answer to it, under the chat template or as they are.

    Args:
        prompt: None: the answer is a whole chat, or a whole text, whose prompt is "" here.
        option: what gave the answer, for messages.
    Raises:
        ValueError: a value of the wrong kind, and whatever the template refuses.
    """
    if renderer.apply_chat_template:
        try:
            if prompt is None:
                return last_turn(renderer, renderer.messages(answer, role="user"), [], tools=tools)
            answers = renderer.messages(answer, role="assistant")
            return last_turn(renderer, renderer.messages(prompt, role="user"), answers, tools=tools)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
    if not isinstance(answer, str):
        kind = type(answer).__name__
        raise ValueError(f"{option} holds a {kind}, not a string: set apply_chat_template for messages")
    check_text(answer)
    return ["" if prompt is None else renderer.prompt(prompt), answer]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Sequence[str]], *, apply_chat_template: bool, rows: Rows
) -> list[tuple[list[int], list[int]]]:
    """`encode_segments` of a prompt and an answer each, in lists."""
    encoded = encode_segments(tokenizer, pairs, apply_chat_template=apply_chat_template, rows=rows)
    return [(prompt.tolist(), answer.tolist()) for prompt, answer in encoded]


def encode_segments(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], *, apply_chat_template: bool, rows: Rows
) -> list[list[TokenIds]]:
    """Tokens of each segment of each row; the last one ends with one EOS.

    A row is tokenized as one text where that begins with the own tokens of each text up to a border, and apart where a
    token would reach over one: generation starts from the prompt's own tokens.
    """
    owners = [index for index, segments in enumerate(texts) for _ in segments[1:]]
    befores = ["".join(segments[:number]) for segments in texts for number in range(1, len(segments))]
    begin = partial(prompt_arrays, tokenizer, apply_chat_template=apply_chat_template, rows=rows)
    joint, starts = begin(["".join(segments) for segments in texts]), iter(begin(befores, owners=owners))
    encoded: list[list[TokenIds]] = []
    split: list[int] = []  # rows with a token over a border
    for index, (whole, segments) in enumerate(zip(joint, texts, strict=True)):
        before = [next(starts) for _ in segments[1:]]
        borders = [len(ids) for ids in before]
        encoded.append(np.split(whole, borders))
        if not all(np.array_equal(whole[: len(ids)], ids) for ids in before):
            split.append(index)
            encoded[-1] = before[:1]
    owners = [index for index in split for _ in texts[index][1:]]
    apart = encode_arrays(tokenizer, [text for index in split for text in texts[index][1:]], rows=rows, owners=owners)
    for index, ids in zip(owners, apart, strict=True):
        encoded[index].append(ids)
    for pieces in encoded:
        pieces[-1] = with_one_eos(pieces[-1], tokenizer)
    return encoded


def with_one_eos(ids: TokenIds, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Tokens that end with EOS once."""
    eos = int(tokenizer.eos_token_id)
    others = np.flatnonzero(ids != eos)
    return np.append(ids[: others[-1] + 1 if len(others) else 0], np.int32(eos))
