"""Prompts for the RL loop, and the order in which they are drawn."""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megarlhf.data.loading import load_rows
from megarlhf.data.rows import json_value
from megarlhf.data.templates import encode_prompts, make_renderer
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
    path: str,
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
) -> PromptData:
    """Read, render and tokenize the prompts of a data file.

    Args:
        path: as for `load_rows`.
        input_key: column of the prompt: a string, or with `apply_chat_template` also a list of messages.
        label_key: column of the reference answer, kept as the JSON value that it is (see `json_value`; in a CSV file a
            string); a row without it has label None.
        apply_chat_template: render with the tokenizer's template, up to where the assistant speaks.
        input_template: format string with one {} for the prompt; None takes the text as it is.
        prompt_max_len: longest prompt in tokens; longer ones are dropped, never cut, and counted.
        max_samples: read only the first so many rows; None reads all.
        vocab_size: tokens that the model has embeddings for.
        needs_label: the reward compares with the label.
    Raises:
        ValueError: a missing or empty prompt, no label where one is needed, a chat template that cannot work, every
            prompt too long, or a token that the model has no embedding for.
    """
    renderer = make_renderer(tokenizer, apply_chat_template=apply_chat_template, input_template=input_template)
    rows = load_rows(path, columns=(input_key, label_key), limit=max_samples)

    def render(index: int) -> tuple[str, Any]:
        text = renderer.prompt(rows.value(index, input_key, option="input_key"))
        try:
            return text, json_value(rows.rows[index].get(label_key))
        except ValueError as error:
            raise ValueError(f"label_key={label_key}: {error}") from error

    rendered = rows.collect(render)
    if all(label is None for _, label in rendered):
        if needs_label:
            raise ValueError(f"label_key={label_key} is in no row of {path}: set label_key to the answer's column")
        logger.info("label_key=%s is in no row of %s: every label is None", label_key, path)
    encoded = encode_prompts(
        tokenizer, [text for text, _ in rendered], apply_chat_template=apply_chat_template, rows=rows
    )

    def check(index: int) -> None:
        if not encoded[index]:
            raise ValueError(f"input_key={input_key} is empty: nothing to continue, remove it")

    rows.collect(check)
    prompts = [
        Prompt(index=index, text=text, token_ids=np.array(ids, dtype=np.int32), label=label)
        for index, ((text, label), ids) in enumerate(zip(rendered, encoded, strict=True))
        if len(ids) <= prompt_max_len
    ]
    if not prompts:
        raise rows.all_too_long("prompt_max_len", prompt_max_len, shortest=min(map(len, encoded)))
    places = [prompt.index for prompt in prompts]
    check_vocabulary(*_flat(prompts), places, tokenizer, rows=rows, vocab_size=vocab_size)
    return PromptData(prompts=prompts, num_dropped=len(rows) - len(prompts))


def _flat(prompts: list[Prompt]) -> tuple[TokenIds, Ints]:
    """Tokens of all prompts, and the place after the last one of each."""
    ends = np.cumsum([len(prompt.token_ids) for prompt in prompts])
    return np.concatenate([prompt.token_ids for prompt in prompts]), ends


class PromptSampler:
    """Endless, stateless order of rows: a batch depends on the seed and on how many rows were drawn before it.

    Epoch e is the permutation drawn from seed + e; batches cut the endless line of epochs, so one batch may hold the
    end of an epoch and the start of the next, and a batch larger than the data holds rows more than once. Continuing
    a run needs its step and the rows consumed so far, and nothing else: the batch size may change.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, *, first_step: int = 0, consumed: int = 0) -> None:
        """Draw from the first `num_rows` rows after `first_step` steps, which drew `consumed` of them."""
        assert num_rows >= 1 and batch_size >= 1, f"a batch of {batch_size} out of {num_rows} rows"
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self._offset = consumed - first_step * batch_size

    def batch(self, step: int) -> list[int]:
        """Places in the list of rows, `batch_size` of them, for a step counted from 0."""
        start, stop = self.consumed(step), self.consumed(step + 1)
        first, last = start // self.num_rows, (stop - 1) // self.num_rows
        orders = [torch.Generator().manual_seed(self.seed + epoch) for epoch in range(first, last + 1)]
        line = [index for order in orders for index in torch.randperm(self.num_rows, generator=order).tolist()]
        offset = first * self.num_rows
        return line[start - offset : stop - offset]

    def consumed(self, step: int) -> int:
        """Rows drawn before a step."""
        return self._offset + step * self.batch_size

    def epoch(self, step: int) -> float:
        """Passes over the data made before a step."""
        return self.consumed(step) / self.num_rows
