"""Rows for supervised fine-tuning: prompt and answer in tokens, with the loss on the answer."""

from dataclasses import replace
from functools import partial

import numpy as np

from megarlhf.data.answers import encode_segments, load_answers, render_row
from megarlhf.data.row_options import RowOptions
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import training_rows


def load_sft_rows(
    options: RowOptions, *, input_key: str, output_key: str | None, pretrain_mode: bool, multiturn: bool
) -> SupervisedData:
    """Read, render and tokenize supervised data.

    Every row ends with one EOS. `prompt_length` is the number of prompt tokens, so the targets are the answer's tokens
    and the EOS; with `pretrain_mode` it is 1 and everything after the first token is a target; with `multiturn` the
    loss mask leaves out what is not the assistant's. The prompt's tokens are those that generation starts from.

    Args:
        input_key: column of the prompt, a string, or with `apply_chat_template` also a list of messages; without
            `output_key`, of a whole chat.
        output_key: column of the answer: a string, or with `apply_chat_template` also a list of messages. None:
            `input_key` holds a list of messages that ends with the assistant's; or, with `pretrain_mode` and no chat
            template, a plain text.
        pretrain_mode: loss on the prompt too.
        multiturn: loss on every turn of the assistant, and not on the last one only.
    Returns:
        Rows, each a unit of its own, with no fields.
    Raises:
        ValueError: a missing or empty value, a tokenizer without EOS, every row too long, or a token that the model
            has no embedding for.
    """
    renderer, rows = options.renderer, load_answers(options, input_key, output_key)
    render = partial(render_row, renderer, rows, input_key=input_key, output_key=output_key, multiturn=multiturn)
    encoded = encode_segments(renderer, rows.collect(render), rows=rows)

    def prompt_length(index: int) -> int:
        first, *others = encoded[index]
        trained = len(first) - 1 + sum(map(len, others)) if pretrain_mode else sum(map(len, others[::2]))
        if trained < 2:
            raise ValueError("it has nothing to train on but the EOS behind it (an empty answer): remove it")
        return 1 if pretrain_mode else len(first)

    prompt_lengths = rows.collect(prompt_length)
    kept = options.fitting(rows, {index: sum(map(len, segments)) for index, segments in enumerate(encoded)})
    found = training_rows([np.concatenate(encoded[i]) for i in kept], [prompt_lengths[i] for i in kept])
    if multiturn:
        said = [np.full(len(ids), number % 2 == 1) for i in kept for number, ids in enumerate(encoded[i]) if number]
        found = replace(found, loss_mask=np.concatenate(said))
    options.check_tokens(rows, found, kept)
    return SupervisedData(rows=found, dropped={options.too_long: len(rows) - len(kept)})
