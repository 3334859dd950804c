"""A prompt and its answer in text and in tokens, for all supervised data."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.row_options import RowOptions
from megarlhf.data.rows import Rows, check_text
from megarlhf.data.templates import Renderer, Tools, encode_arrays, encode_prompts, row_tools
from megarlhf.data.turns import every_turn, last_turn
from megarlhf.data.types import TokenIds


def load_answers(options: RowOptions, *columns: str | None) -> Rows:
    """As `RowOptions.load`, for rows that end with EOS.

    Raises:
        ValueError: a tokenizer that has none.
    """
    if options.tokenizer.eos_token_id is None:
        name = options.tokenizer.name_or_path
        raise ValueError(f"tokenizer={name} has no EOS: a model trained without one never stops")
    return options.load(*columns)


def render_row(
    renderer: Renderer, rows: Rows, index: int, *, input_key: str, output_key: str | None, multiturn: bool = False
) -> list[str]:
    """`render_answer` of two columns of a row, or of one that holds a whole chat or a text without an answer."""
    given = rows.value(index, input_key, option="input_key")
    tools = row_tools(rows, index) if renderer.apply_chat_template else None
    if output_key is not None:
        answer, option = rows.value(index, output_key, option="output_key"), f"output_key={output_key}"
        return render_answer(renderer, given, answer, option, tools=tools, multiturn=multiturn)
    if not renderer.apply_chat_template:
        return [renderer.prompt(given), ""]
    return render_answer(renderer, None, given, f"input_key={input_key}", tools=tools, multiturn=multiturn)


def render_answer(
    renderer: Renderer,
    prompt: object | None,
    answer: object,
    option: str,
    *,
    tools: Tools | None,
    multiturn: bool = False,
) -> list[str]:
    """Text of a prompt and of the answer to it, under the chat template (by `every_turn` or the last) or as they are.

    Args:
        prompt: None: the answer is a whole chat, or a whole text, whose prompt is "" here.
        option: what gave the answer, for messages.
    Raises:
        ValueError: a value of the wrong kind, an empty answer, and whatever the template refuses.
    """
    if renderer.apply_chat_template:
        try:
            answers = [] if prompt is None else renderer.messages(answer, role="assistant")
            messages = renderer.messages(answer if prompt is None else prompt, role="user")
            return (every_turn if multiturn else last_turn)(renderer, messages, answers, tools=tools)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
    if not isinstance(answer, str):
        kind = type(answer).__name__
        raise ValueError(f"{option} holds a {kind}, not a string: set apply_chat_template for messages")
    if not answer:
        raise ValueError(f"{option} is empty: remove the row")
    check_text(answer)
    return ["" if prompt is None else renderer.prompt(prompt), answer]


def encode_pairs(
    renderer: Renderer, pairs: Sequence[Sequence[str]], *, rows: Rows
) -> list[tuple[list[int], list[int]]]:
    """`encode_segments` of a prompt and an answer each, in lists."""
    return [(prompt.tolist(), answer.tolist()) for prompt, answer in encode_segments(renderer, pairs, rows=rows)]


def encode_segments(renderer: Renderer, texts: Sequence[Sequence[str]], *, rows: Rows) -> list[list[TokenIds]]:
    """Tokens of each segment of each row; the last one ends with one EOS.

    A row is tokenized as one text where that begins with the own tokens of each text up to a border, and apart where a
    token would reach over one: generation starts from the prompt's own tokens.

    Raises:
        ValueError: an empty prompt, also where BOS would stand for it.
    """
    owners = [index for index, segments in enumerate(texts) for _ in segments[1:]]
    befores = ["".join(segments[:number]) for segments in texts for number in range(1, len(segments))]
    joint = encode_prompts(renderer, ["".join(segments) for segments in texts], rows=rows)
    starts = iter(encode_prompts(renderer, befores, rows=rows, owners=owners))
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
    others = [text for index in split for text in texts[index][1:]]
    apart = encode_arrays(renderer.tokenizer, others, rows=rows, owners=owners)
    for index, ids in zip(owners, apart, strict=True):
        encoded[index].append(ids)

    def ended(index: int) -> list[TokenIds]:
        prompt, *others, answer = encoded[index]
        if not texts[index][0] or not len(prompt):
            raise ValueError("its prompt is empty: remove the row")
        return [prompt, *others, with_one_eos(answer, renderer.tokenizer)]

    return rows.collect(ended)


def with_one_eos(ids: TokenIds, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Tokens that end with EOS once."""
    eos = int(tokenizer.eos_token_id)
    others = np.flatnonzero(ids != eos)
    return np.append(ids[: others[-1] + 1 if len(others) else 0], np.int32(eos))
