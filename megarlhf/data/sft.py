"""Rows for supervised fine-tuning: prompt and answer in tokens, with the loss on the answer."""

from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.answers import check_eos, encode_segments
from megarlhf.data.loading import DataSource, load_rows
from megarlhf.data.rows import check_text
from megarlhf.data.supervised import SupervisedData, too_long
from megarlhf.data.templates import TOOLS, make_renderer, row_tools
from megarlhf.data.token_ids import check_vocabulary
from megarlhf.data.turns import every_turn, last_turn
from megarlhf.data.types import training_rows


def load_sft_rows(
    source: str | DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    input_key: str,
    output_key: str | None,
    apply_chat_template: bool,
    input_template: str | None,
    max_len: int,
    pretrain_mode: bool,
    multiturn: bool,
    max_samples: int | None,
    vocab_size: int,
) -> SupervisedData:
    """Read, render and tokenize supervised data; arguments as for `load_prompts`, and:

    A column `tools` goes to the chat template. Every row ends with one EOS. `prompt_length` is the number of prompt
    tokens, so the targets are the answer's tokens and the EOS; with `pretrain_mode` it is 1 and everything after the
    first token is a target; with `multiturn` the loss mask leaves out what is not the assistant's. The prompt's tokens
    are those that generation starts from.

    Args:
        input_key: column of the prompt; without `output_key`, of a whole chat.
        output_key: column of the answer: a string, or with `apply_chat_template` also a list of messages. None:
            `input_key` holds a list of messages that ends with the assistant's; or, with `pretrain_mode` and no chat
            template, a plain text.
        max_len: longest row in tokens, EOS included; longer ones are dropped, never cut, and counted.
        pretrain_mode: loss on the prompt too.
        multiturn: loss on every turn of the assistant, and not on the last one only.
    Returns:
        Rows, each a unit of its own, with no fields.
    Raises:
        ValueError: a missing or empty value, a tokenizer without EOS, every row too long, or a token that the model
            has no embedding for.
    """
    renderer = make_renderer(tokenizer, apply_chat_template=apply_chat_template, input_template=input_template)
    check_eos(tokenizer)
    keys = [input_key, *([] if output_key is None else [output_key]), *([TOOLS] if apply_chat_template else [])]
    rows = load_rows(source, columns=keys, limit=max_samples)

    def render(index: int) -> list[str]:
        prompt = rows.value(index, input_key, option="input_key")
        response = None if output_key is None else rows.value(index, output_key, option="output_key")
        if apply_chat_template:
            tools = row_tools(rows, index)
            messages = renderer.messages(prompt, role="user")
            answer = [] if response is None else renderer.messages(response, role="assistant")
            return (every_turn if multiturn else last_turn)(renderer, messages, answer, tools=tools)
        text = renderer.prompt(prompt)
        if not isinstance(response, str | None):
            raise ValueError(f"output_key={output_key} holds a {type(response).__name__}, not a string")
        check_text(response or "")
        return [text, response or ""]

    encoded = encode_segments(tokenizer, rows.collect(render), apply_chat_template=apply_chat_template, rows=rows)

    def prompt_length(index: int) -> int:
        first, *others = encoded[index]
        length = 1 if pretrain_mode else len(first)
        if length < 1:
            raise ValueError(f"input_key={input_key} is empty: remove it")
        trained = len(first) - 1 + sum(map(len, others)) if pretrain_mode else sum(map(len, others[::2]))
        if trained < 2:
            raise ValueError("it has nothing to train on but the EOS behind it (an empty answer): remove it")
        return length

    prompt_lengths = rows.collect(prompt_length)
    sizes = [sum(map(len, segments)) for segments in encoded]
    kept = [index for index, size in enumerate(sizes) if size <= max_len]
    if not kept:
        raise rows.all_too_long("max_len", max_len, shortest=min(sizes))
    found = training_rows([np.concatenate(encoded[i]) for i in kept], [prompt_lengths[i] for i in kept])
    if multiturn:
        said = [np.full(len(ids), number % 2 == 1) for i in kept for number, ids in enumerate(encoded[i]) if number]
        found = replace(found, loss_mask=np.concatenate(said))
    ends = np.cumsum(found.lengths)
    check_vocabulary(found.input_ids, ends, kept, tokenizer, rows=rows, vocab_size=vocab_size)
    return SupervisedData(rows=found, dropped={too_long(max_len): len(rows) - len(kept)})
