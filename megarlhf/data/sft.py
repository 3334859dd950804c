"""Rows for supervised fine-tuning: prompt and answer in tokens, with the loss on the answer."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.loading import load_rows
from megarlhf.data.rows import Rows, check_text
from megarlhf.data.supervised import SupervisedData, too_long
from megarlhf.data.templates import Renderer, encode, encode_prompts, make_renderer
from megarlhf.data.token_ids import check_vocabulary
from megarlhf.data.types import training_rows


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
    vocab_size: int,
) -> SupervisedData:
    """Read, render and tokenize a supervised data file; arguments as for `load_prompts`, and:

    Every row ends with one EOS. `prompt_length` is the number of prompt tokens, so the targets are the answer's
    tokens and the EOS; with `pretrain_mode` it is 1 and everything after the first token is a target. The prompt's
    tokens are those that generation starts from.

    Args:
        input_key: column of the prompt; without `output_key`, of a whole chat.
        output_key: column of the answer: a string, or with `apply_chat_template` also a list of messages. None:
            `input_key` holds a list of messages that ends with the assistant's, and the loss is on that last turn
            only, not on earlier assistant turns; or, with `pretrain_mode` and no chat template, a plain text.
        max_len: longest row in tokens, EOS included; longer ones are dropped, never cut, and counted.
        pretrain_mode: loss on the prompt too.
    Returns:
        Rows, each a unit of its own, with no fields.
    Raises:
        ValueError: a missing or empty value, a tokenizer without EOS, every row too long, or a token that the model
            has no embedding for.
    """
    renderer = make_renderer(tokenizer, apply_chat_template=apply_chat_template, input_template=input_template)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={tokenizer.name_or_path} has no EOS: a model trained without one never stops")
    keys = (input_key,) if output_key is None else (input_key, output_key)
    rows = load_rows(path, columns=keys, limit=max_samples)

    def render(index: int) -> tuple[str, str]:
        prompt = rows.value(index, input_key, option="input_key")
        response = None if output_key is None else rows.value(index, output_key, option="output_key")
        if apply_chat_template:
            return _render_chat(renderer, prompt, response)
        text = renderer.prompt(prompt)
        if not isinstance(response, str | None):
            raise ValueError(f"output_key={output_key} holds a {type(response).__name__}, not a string")
        check_text(response or "")
        return text, response or ""

    encoded = _encode_pairs(tokenizer, rows.collect(render), apply_chat_template=apply_chat_template, rows=rows)

    def prompt_length(index: int) -> int:
        prompt_ids, response_ids = encoded[index]
        length = 1 if pretrain_mode else len(prompt_ids)
        if not 1 <= length < len(prompt_ids) + len(response_ids):
            raise ValueError(f"input_key={input_key} is empty: remove it")
        return length

    prompt_lengths = rows.collect(prompt_length)
    sizes = [len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in encoded]
    kept = [index for index, size in enumerate(sizes) if size <= max_len]
    if not kept:
        raise rows.all_too_long("max_len", max_len, shortest=min(sizes))
    found = training_rows([sum(encoded[index], []) for index in kept], [prompt_lengths[index] for index in kept])
    ends = np.cumsum(found.lengths)
    check_vocabulary(found.input_ids, ends, kept, tokenizer, rows=rows, vocab_size=vocab_size)
    return SupervisedData(rows=found, dropped={too_long(max_len): len(rows) - len(kept)})


def _render_chat(renderer: Renderer, prompt: object, response: object | None) -> tuple[str, str]:
    """Prompt and response of a row as text."""
    messages = renderer.messages(prompt, role="user")
    if response is None:
        messages, answer = messages[:-1], messages[-1:]
        if not messages or answer[0]["role"] != "assistant":
            raise ValueError("a whole chat ends with the assistant's message, after at least one other")
    else:
        answer = renderer.messages(response, role="assistant")
    before = renderer.chat(messages, add_generation_prompt=True)
    whole = renderer.chat(messages + answer, add_generation_prompt=False)
    if not whole.startswith(before):
        raise ValueError(
            "apply_chat_template=True: the rendered chat does not begin with its rendered prompt, so the answer's "
            "tokens cannot be told apart: set tokenizer_chat_template to one that only appends"
        )
    # Templates put a line break after the token that ends the turn; generation has stopped before it.
    return before, whole[len(before) :].rstrip()


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], *, apply_chat_template: bool, rows: Rows
) -> list[tuple[list[int], list[int]]]:
    """Tokens of each prompt and of its response, which ends with one EOS.

    Prompt and response are tokenized as one text where that begins with the prompt's own tokens, and apart where a
    token would reach over the border: generation starts from the prompt's own tokens.
    """
    prompts = encode_prompts(tokenizer, [a for a, _ in pairs], apply_chat_template=apply_chat_template, rows=rows)
    joint = encode_prompts(tokenizer, [a + b for a, b in pairs], apply_chat_template=apply_chat_template, rows=rows)
    apart = encode(tokenizer, [response for _, response in pairs], rows=rows)
    encoded = []
    for prompt_ids, whole, alone in zip(prompts, joint, apart, strict=True):
        response = whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else list(alone)
        while response and response[-1] == tokenizer.eos_token_id:
            response.pop()
        encoded.append((prompt_ids, [*response, int(tokenizer.eos_token_id)]))
    return encoded
