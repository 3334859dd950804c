"""Prompts for the RL loop."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.loading import DataSource, load_rows
from megarlhf.data.rows import json_value
from megarlhf.data.templates import TOOLS, encode_prompts, make_renderer, row_tools
from megarlhf.data.token_ids import check_vocabulary, fingerprint
from megarlhf.data.types import Ints, Prompt, TokenIds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PromptData:
    """Prompts that fit, and how many did not."""

    prompts: list[Prompt]
    num_dropped: int  # prompts longer than prompt_max_len

    @cached_property
    def fingerprint(self) -> str:
        """Hex fingerprint of all prompts' tokens and labels in their order; equal on every machine."""
        return fingerprint(*_flat(self.prompts), [prompt.label for prompt in self.prompts])


def load_prompts(
    source: str | DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    input_key: str,
    label_key: str,
    apply_chat_template: bool,
    input_template: str | None,
    prompt_max_len: int,
    max_samples: int | None,
    vocab_size: int,
    needs_label: bool = False,
    suffix: str = "",
) -> PromptData:
    """Read, render and tokenize the prompts of data sets.

    Args:
        source: as for `load_rows`.
        input_key: column of the prompt: a string, or with `apply_chat_template` also a list of messages.
        label_key: column of the reference answer, kept as the JSON value that it is (see `json_value`; in a CSV file a
            string); a row without it has label None.
        apply_chat_template: render with the tokenizer's template, up to where the assistant speaks.
        input_template: format string with one {} for the prompt; None takes the text as it is.
        prompt_max_len: longest prompt in tokens; longer ones are dropped, never cut, and counted.
        max_samples: read only the first so many rows; None reads all.
        vocab_size: tokens that the model has embeddings for.
        needs_label: the reward compares with the label.
        suffix: what the model reads behind each prompt; it is in the tokens alone.
    Raises:
        ValueError: a missing or empty prompt, no label where one is needed, a chat template that cannot work, every
            prompt too long, or a token that the model has no embedding for.
    """
    renderer = make_renderer(tokenizer, apply_chat_template=apply_chat_template, input_template=input_template)
    rows = load_rows(source, columns=(input_key, label_key, TOOLS), limit=max_samples)

    def render(index: int) -> tuple[str, Any, dict[str, Any]]:
        tools = row_tools(rows, index) if apply_chat_template else None
        value = rows.value(index, input_key, option="input_key")
        text = renderer.prompt(value, tools=tools)
        given = {"chat": value, "tools": tools} if apply_chat_template else {}
        try:
            return text, json_value(rows.rows[index].get(label_key)), given
        except ValueError as error:
            raise ValueError(f"label_key={label_key}: {error}") from error

    rendered = rows.collect(render)
    if all(label is None for _, label, _ in rendered):
        if needs_label:
            raise ValueError(f"label_key={label_key} is in no row of {rows.path}: set label_key to the answer's column")
        logger.info("label_key=%s is in no row of %s: every label is None", label_key, rows.path)
    encoded = encode_prompts(renderer, [text + suffix for text, *_ in rendered], rows=rows)

    def check(index: int) -> None:
        if not len(encoded[index]):
            raise ValueError(f"input_key={input_key} is empty: nothing to continue, remove it")

    rows.collect(check)
    prompts = [
        Prompt(index=index, text=text, token_ids=ids, label=label, **given)
        for index, ((text, label, given), ids) in enumerate(zip(rendered, encoded, strict=True))
        if len(ids) <= prompt_max_len
    ]
    if not prompts:
        raise rows.all_too_long("prompt_max_len", prompt_max_len, shortest=min(map(len, encoded)))
    places = [prompt.index for prompt in prompts]
    check_vocabulary(*_flat(prompts), places, tokenizer, rows=rows, vocab_size=vocab_size)
    return PromptData(prompts=prompts, num_dropped=len(rows) - len(prompts))


def prompts_in_both(training: PromptData, evaluation: Sequence[Prompt]) -> int:
    """Prompts of the evaluation that are trained on too, token for token."""
    trained = {prompt.token_ids.tobytes() for prompt in training.prompts}
    return sum(prompt.token_ids.tobytes() in trained for prompt in evaluation)


def _flat(prompts: list[Prompt]) -> tuple[TokenIds, Ints]:
    """Tokens of all prompts, and the place after the last one of each."""
    ends = np.cumsum([len(prompt.token_ids) for prompt in prompts])
    return np.concatenate([prompt.token_ids for prompt in prompts]), ends
