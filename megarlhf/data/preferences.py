"""Rows of preferences: pairs of a chosen and a rejected answer to one prompt."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from megarlhf.data.answers import encode_pairs, load_answers, render_answer, with_one_eos
from megarlhf.data.row_options import RowOptions
from megarlhf.data.rows import Rows
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.templates import Renderer, encode_prompts, row_tools, special_prefix
from megarlhf.data.types import TrainingRows, training_rows

EQUAL = "with chosen equal to rejected"
_MARGIN, _PROMPT = "margin", "prompt"
Encoded = tuple[list[int], list[int]]  # tokens of a prompt, and of an answer with its EOS


def load_preference_rows(
    options: RowOptions, *, prompt_key: str | None, chosen_key: str, rejected_key: str, margin: bool, values: bool
) -> SupervisedData:
    """Read, render and tokenize preferences.

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
    renderer, keys = options.renderer, {"chosen_key": chosen_key, "rejected_key": rejected_key}
    rows = load_answers(options, *keys.values(), prompt_key, _MARGIN if margin else None)

    def render(index: int) -> list[list[str]]:
        tools = row_tools(rows, index) if renderer.apply_chat_template else None
        prompt = None if prompt_key is None else rows.value(index, prompt_key, option="prompt_key")
        answers = {f"{option}={key}": rows.value(index, key, option=option) for option, key in keys.items()}
        pair = [render_answer(renderer, prompt, answer, option, tools=tools) for option, answer in answers.items()]
        if pair[0][0] != pair[1][0]:
            raise ValueError(
                f"the chats of {' and '.join(answers)} differ before their last assistant message (both must answer "
                "the same prompt): remove the row"
            )
        return pair

    rendered = rows.collect(render)
    whole_texts = prompt_key is None and not renderer.apply_chat_template
    encode = _encode_whole if whole_texts else encode_pairs
    chosen, rejected = (encode(renderer, [pair[place] for pair in rendered], rows=rows) for place in (0, 1))
    pairs = [*zip(chosen, rejected, strict=True)]
    if whole_texts:
        first = len(special_prefix(options.tokenizer))
        pairs = rows.collect(lambda index: _common_prompt(*pairs[index], first, rows.names(index)))
    margins = rows.collect(lambda index: _number(rows.rows[index].get(_MARGIN)) if margin else 0.0)
    differ = [index for index, ((_, first), (_, second)) in enumerate(pairs) if first != second]
    if not differ:
        raise ValueError(f"{rows.path}: each of its {len(rows)} rows is one {EQUAL}: nothing is preferred to anything")
    sizes = {index: max(len(prompt) + len(answer) for prompt, answer in pairs[index]) for index in differ}
    kept = options.fitting(rows, sizes)
    filler = [int(options.tokenizer.eos_token_id)] if values else []
    found = _pair_rows([pairs[index] for index in kept], filler=filler)
    options.check_tokens(rows, found, np.repeat(kept, 2).tolist())
    if margin:
        each = np.array([margins[index] for index in kept], dtype=np.float32)
        found = found.with_fields({}, scalars={_MARGIN: np.repeat(each, 2)})
    return SupervisedData(
        rows=_last_target_only(found) if values else found,
        dropped={EQUAL: len(rows) - len(differ), options.too_long: len(differ) - len(kept)},
    )


def _pair_rows(pairs: list[tuple[Encoded, Encoded]], *, filler: list[int]) -> TrainingRows:
    """Both rows of each pair, as a unit."""
    members = [encoded for pair in pairs for encoded in pair]
    return training_rows(
        [prompt + answer + filler for prompt, answer in members],
        [len(prompt) for prompt, _ in members],
        unit_ids=np.repeat(np.arange(len(pairs)), 2).tolist(),
    )


def _encode_whole(renderer: Renderer, texts: list[list[str]], *, rows: Rows) -> list[Encoded]:
    """Tokens of texts whose prompts are not known yet."""
    encoded = encode_prompts(renderer, [text for _, text in texts], rows=rows)
    return [([], with_one_eos(ids, renderer.tokenizer).tolist()) for ids in encoded]


def _common_prompt(
    chosen: Encoded, rejected: Encoded, first: int, columns: Sequence[str]
) -> tuple[Encoded, Encoded]:
    """Both with what they begin with in common as their prompt: more than the `first` tokens of every text.

    Where the texts are the same the pair goes, and where one goes on behind the other its EOS differs.
    """
    both = zip(chosen[1], rejected[1], strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], both)))
    if shared <= first:
        near = f" (there is a column {_PROMPT!r})" if _PROMPT in columns else ""
        raise ValueError(
            f"the texts have no common beginning, so there is no prompt to answer: set prompt_key{near}, or remove the "
            "row"
        )
    return (chosen[1][:shared], chosen[1][shared:]), (rejected[1][:shared], rejected[1][shared:])


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
