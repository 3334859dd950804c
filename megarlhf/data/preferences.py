"""Rows of preferences: pairs of a chosen and a rejected answer to one prompt."""

import math
from dataclasses import replace
from itertools import takewhile

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.answers import check_eos, encode_pairs, render_answer, with_one_eos
from megarlhf.data.loading import DataSource, load_rows
from megarlhf.data.rows import Rows
from megarlhf.data.supervised import SupervisedData, too_long
from megarlhf.data.templates import TOOLS, Renderer, make_renderer, prompt_arrays, row_tools
from megarlhf.data.token_ids import check_vocabulary
from megarlhf.data.types import TrainingRows, training_rows

EQUAL = "with chosen equal to rejected"
_MARGIN = "margin"
Encoded = tuple[list[int], list[int]]  # tokens of a prompt, and of an answer with its EOS


def load_preference_rows(
    source: str | DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_key: str | None,
    chosen_key: str,
    rejected_key: str,
    margin: bool,
    input_template: str | None,
    apply_chat_template: bool,
    max_len: int,
    max_samples: int | None,
    vocab_size: int,
    values: bool,
) -> SupervisedData:
    """Read, render and tokenize a file of preferences; arguments as for `load_sft_rows`, and:

    Each row of the file becomes a unit of two rows, chosen (even) and rejected (odd), which begin with the same prompt
    tokens and end with one EOS each. A pair of the same tokens is dropped and counted, and so is one with a row longer
    than `max_len`.

    Args:
        prompt_key: column of the prompt: a string, or with `apply_chat_template` also a list of messages. None: the
            other two columns hold whole chats, whose prompt is what comes before the last assistant message and must be
            the same in both; or, without a chat template, whole texts, whose prompt is the tokens that both begin with.
        chosen_key, rejected_key: columns of the answers: strings, or with `apply_chat_template` also lists of messages.
        margin: read the column `margin`, a number, into the rows' scalar of that name.
        values: for a model with one value a token: put one more token behind the EOS, which `max_len` does not count,
            and let the loss look at that target alone, so that the value read is that of the EOS.
    Returns:
        Rows without fields, in units of two.
    Raises:
        ValueError: a missing or empty value, prompts that differ, a margin that is no number, a tokenizer without EOS,
            no pair left, or a token that the model has no embedding for.
    """
    renderer = make_renderer(tokenizer, apply_chat_template=apply_chat_template, input_template=input_template)
    check_eos(tokenizer)
    options = {"chosen_key": chosen_key, "rejected_key": rejected_key}
    more = ([] if prompt_key is None else [prompt_key]) + ([_MARGIN] if margin else [])
    more += [TOOLS] if apply_chat_template else []
    rows = load_rows(source, columns=[*options.values(), *more], limit=max_samples)

    def render(index: int) -> list[list[str]]:
        tools = row_tools(rows, index) if apply_chat_template else None
        prompt = None if prompt_key is None else rows.value(index, prompt_key, option="prompt_key")
        answers = {f"{option}={key}": rows.value(index, key, option=option) for option, key in options.items()}
        pair = [render_answer(renderer, prompt, answer, option, tools=tools) for option, answer in answers.items()]
        if pair[0][0] != pair[1][0]:
            raise ValueError(
                f"the chats of {' and '.join(answers)} differ before their last assistant message (both must answer "
                "the same prompt): remove the row"
            )
        return pair

    rendered = rows.collect(render)
    chosen, rejected = (
        _encode(tokenizer, [pair[place] for pair in rendered], renderer, whole_texts=prompt_key is None, rows=rows)
        for place in (0, 1)
    )
    pairs = rows.collect(lambda index: _same_prompt(chosen[index], rejected[index], prompt_key))
    margins = rows.collect(lambda index: _number(rows.rows[index].get(_MARGIN)) if margin else 0.0)
    differ = [index for index, ((_, first), (_, second)) in enumerate(pairs) if first != second]
    if not differ:
        raise ValueError(f"{rows.path}: each of its {len(rows)} rows is one {EQUAL}: nothing is preferred to anything")
    sizes = {index: max(len(prompt) + len(answer) for prompt, answer in pairs[index]) for index in differ}
    kept = [index for index in differ if sizes[index] <= max_len]
    if not kept:
        raise rows.all_too_long("max_len", max_len, shortest=min(sizes.values()))

    found = _pair_rows([pairs[index] for index in kept], filler=[int(tokenizer.eos_token_id)] if values else [])
    places = np.repeat(kept, 2).tolist()
    check_vocabulary(found.input_ids, np.cumsum(found.lengths), places, tokenizer, rows=rows, vocab_size=vocab_size)
    if margin:
        each = np.array([margins[index] for index in kept], dtype=np.float32)
        found = found.with_fields({}, scalars={_MARGIN: np.repeat(each, 2)})
    return SupervisedData(
        rows=_last_target_only(found) if values else found,
        dropped={EQUAL: len(rows) - len(differ), too_long(max_len): len(differ) - len(kept)},
    )


def _pair_rows(pairs: list[tuple[Encoded, Encoded]], *, filler: list[int]) -> TrainingRows:
    """Both rows of each pair, as a unit."""
    members = [encoded for pair in pairs for encoded in pair]
    return training_rows(
        [prompt + answer + filler for prompt, answer in members],
        [len(prompt) for prompt, _ in members],
        unit_ids=np.repeat(np.arange(len(pairs)), 2).tolist(),
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[list[str]],
    renderer: Renderer,
    *,
    whole_texts: bool,
    rows: Rows,
) -> list[Encoded]:
    if renderer.apply_chat_template or not whole_texts:
        return encode_pairs(tokenizer, pairs, apply_chat_template=renderer.apply_chat_template, rows=rows)
    texts = prompt_arrays(tokenizer, [text for _, text in pairs], apply_chat_template=False, rows=rows)
    return [([], with_one_eos(ids, tokenizer).tolist()) for ids in texts]


def _same_prompt(chosen: Encoded, rejected: Encoded, prompt_key: str | None) -> tuple[Encoded, Encoded]:
    """Both with one prompt, which is what whole texts begin with in common."""
    if not chosen[0] and prompt_key is None:
        pairs = zip(chosen[1], rejected[1], strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        # Where the texts are the same the pair goes, and where one goes on behind the other its EOS differs.
        chosen, rejected = (([*ids[:shared]], ids[shared:]) for _, ids in (chosen, rejected))
    if not chosen[0]:
        what = "the texts have no common beginning" if prompt_key is None else f"prompt_key={prompt_key} is empty"
        raise ValueError(f"{what}, so there is no prompt to answer: set prompt_key, or remove the row")
    return chosen, rejected


def _number(value: object) -> float:
    """A margin, also where CSV has made it a string."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{_MARGIN}={value!r:.100} is not a number: correct it, or leave out margin_loss")
    return number


def _last_target_only(rows: TrainingRows) -> TrainingRows:
    mask = np.zeros(int(rows.num_targets.sum()), dtype=np.bool_)
    mask[np.cumsum(rows.num_targets) - 1] = True
    return replace(rows, loss_mask=mask)
