"""Rows for a process reward model: a solution whose steps end with a placeholder token, and a label for each step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.row_options import RowOptions
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.templates import encode_prompts, row_tools
from megarlhf.data.types import Floats, TokenIds, TrainingRows, training_rows


def load_process_reward_rows(
    options: RowOptions,
    *,
    input_key: str,
    label_key: str,
    placeholder_token: str,
    reward_tokens: Sequence[str] | None,
) -> SupervisedData:
    """Read, render and tokenize solutions with a label for each placeholder.

    What the model predicts at a placeholder is its judgement of the step, so the loss looks at the target behind each
    placeholder and at no other. Where a placeholder is the last token, another one stands behind it, which `max_len`
    does not count.

    Args:
        input_key: column of the text; with `apply_chat_template` a string (one user message) or a list of messages,
            which is rendered whole.
        label_key: column of the labels, a list with one for each placeholder: a reward token, or with two
            `reward_tokens` the probability of the first.
        placeholder_token: text that is one token.
        reward_tokens: texts of one token each; None: any token may be a label.
    Returns:
        Rows, each a unit of its own, with the field `shares` [targets, k] of the label's probability of each reward
        token or, without reward_tokens, `label_ids` [targets] of token ids.
    Raises:
        ValueError: a missing value, no placeholder, labels that are not as many or not of these kinds, a text that is
            not one token, every row too long, or a token that the model has no embedding for.
    """
    tokenizer, vocab_size = options.tokenizer, options.vocab_size
    placeholder = one_token(tokenizer, "placeholder_token", placeholder_token, vocab_size)
    choices = reward_token_ids(tokenizer, reward_tokens, vocab_size)
    renderer, rows = options.renderer, options.load(input_key, label_key)

    def render(index: int) -> str:
        value = rows.value(index, input_key, option="input_key")
        if renderer.apply_chat_template:
            messages, tools = renderer.messages(value, role="user"), row_tools(rows, index)
            return renderer.chat(messages, add_generation_prompt=False, tools=tools)
        return renderer.prompt(value)

    encoded = encode_prompts(renderer, rows.collect(render), rows=rows)

    def labels(index: int) -> list[Floats]:
        found = rows.value(index, label_key, option="label_key")
        count = int((encoded[index] == placeholder).sum())
        if not isinstance(found, list):
            raise ValueError(f"label_key={label_key} holds a {type(found).__name__}, not a list of labels")
        if not count or len(found) != count:
            raise ValueError(
                f"label_key={label_key} has {len(found)} labels, and the text {count} tokens "
                f"placeholder_token={placeholder_token!r} (each step has one of both): correct the row"
            )
        try:
            if choices is None:
                return [np.array(one_token(tokenizer, "label", label, vocab_size), np.float32) for label in found]
            return [_shares(label, choices) for label in found]
        except ValueError as error:
            raise ValueError(f"label_key={label_key}: {error}") from error

    every_label = rows.collect(labels)
    kept = options.fitting(rows, dict(enumerate(map(len, encoded))))
    sequences = [[*ids, placeholder] if ids[-1] == placeholder else ids for ids in (encoded[index] for index in kept)]
    found = training_rows(sequences, [1] * len(kept))
    options.check_tokens(rows, found, kept)
    given = np.stack([label for index in kept for label in every_label[index]])
    found = _labelled(found, placeholder, given, name="label_ids" if choices is None else "shares")
    return SupervisedData(rows=found, dropped={options.too_long: len(rows) - len(kept)})


def _labelled(rows: TrainingRows, placeholder: int, given: Floats, *, name: str) -> TrainingRows:
    """Rows whose loss looks at the target behind each placeholder, with its label, of `given` one after the other."""
    inputs = np.ones(len(rows.input_ids), dtype=np.bool_)
    inputs[np.cumsum(rows.lengths) - 1] = False  # a row's last token is never an input
    mask = (rows.input_ids == placeholder)[inputs]
    field = np.zeros((len(mask), *given.shape[1:]), dtype=np.float32)
    field[mask] = given
    return replace(rows.with_fields({name: field}), loss_mask=mask)


def reward_token_ids(
    tokenizer: PreTrainedTokenizerBase, reward_tokens: Sequence[str] | None, vocab_size: int
) -> dict[str, int] | None:
    """Token ids of the reward tokens by their text, in their order; None where there are none.

    Raises:
        ValueError: a text that is not one token, two that are the same, or fewer than two.
    """
    if reward_tokens is None:
        return None
    ids = {text: one_token(tokenizer, "reward_tokens", text, vocab_size) for text in reward_tokens}
    if len(reward_tokens) < 2:
        raise ValueError(f"reward_tokens={' '.join(reward_tokens)} leaves nothing to decide: give at least two")
    if len(set(ids.values())) < len(reward_tokens):
        raise ValueError(f"reward_tokens={' '.join(reward_tokens)} names a token twice: give each once")
    return ids


def one_token(tokenizer: PreTrainedTokenizerBase, option: str, text: object, vocab_size: int) -> int:
    """Id of a text that is one token.

    Raises:
        ValueError: it is no text, or none or several tokens, or one that the model has no embedding for.
    """
    if not isinstance(text, str):
        raise ValueError(
            f"{option}={text!r:.100} is no text of a token: numbers need two reward_tokens, of which they are the "
            "first one's probability"
        )
    ids: TokenIds = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"{option}={text!r} is {len(ids)} tokens of tokenizer={tokenizer.name_or_path} (a judgement is one token): "
            "choose a text that is one token"
        )
    if ids[0] >= vocab_size:
        raise ValueError(
            f"{option}={text!r} is token {ids[0]}, and pretrain has vocab_size={vocab_size}: choose another, or resize "
            "the model's embedding"
        )
    return int(ids[0])


def _shares(label: object, choices: Mapping[str, int]) -> Floats:
    """[k] the label's probability of each reward token."""
    if isinstance(label, str):
        if label not in choices:
            raise ValueError(f"{label!r:.100} is none of reward_tokens={' '.join(choices)}: add or correct it")
        return np.array([choice == label for choice in choices], dtype=np.float32)
    if not isinstance(label, int | float) or isinstance(label, bool) or not 0 <= label <= 1:
        raise ValueError(f"{label!r:.100} is neither a reward token nor a probability from 0 to 1: correct it")
    if len(choices) != 2:
        raise ValueError(
            f"{label!r} is the probability of one of two reward tokens, and reward_tokens={' '.join(choices)} are "
            f"{len(choices)}: give two"
        )
    return np.array([label, 1.0 - label], dtype=np.float32)
