"""Rows of single answers that are labelled as desirable or not."""

from collections import defaultdict

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.answers import check_eos, encode_pairs, render_answer
from megarlhf.data.loading import DataSource, load_rows
from megarlhf.data.supervised import SupervisedData, too_long
from megarlhf.data.templates import TOOLS, make_renderer, row_tools
from megarlhf.data.token_ids import check_vocabulary
from megarlhf.data.types import training_rows

DESIRABLE = "desirable"
_LABELS = {"1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0, "true": 1.0, "false": 0.0}
_BALANCED = (0.9, 1.5)  # [1, 4/3] and a tenth on both sides


def load_labelled_rows(
    source: str | DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    input_key: str,
    output_key: str | None,
    label_key: str,
    apply_chat_template: bool,
    input_template: str | None,
    max_len: int,
    max_samples: int | None,
    vocab_size: int,
) -> SupervisedData:
    """Read, render and tokenize a file of labelled answers; arguments as for `load_sft_rows`, and:

    Args:
        label_key: column that holds 1 or true for a desirable answer, 0 or false for another.
    Returns:
        Rows, each a unit of its own, with the scalar `desirable`, 1 or 0. `unmatched` holds, for each, its prompt with
        an answer of another row that is none of those to this prompt, drawn by a fixed seed.
    Raises:
        ValueError: a missing or empty value, a label that is none, a tokenizer without EOS, every row too long, a
            prompt that no other prompt's answer fits behind, or a token that the model has no embedding for.
    """
    renderer = make_renderer(tokenizer, apply_chat_template=apply_chat_template, input_template=input_template)
    check_eos(tokenizer)
    answers = [] if output_key is None else [output_key]
    tools_key = [TOOLS] if apply_chat_template else []
    rows = load_rows(source, columns=[input_key, *answers, label_key, *tools_key], limit=max_samples)

    def render(index: int) -> list[str]:
        tools = row_tools(rows, index) if apply_chat_template else None
        given = rows.value(index, input_key, option="input_key")
        if output_key is None:
            return render_answer(renderer, None, given, f"input_key={input_key}", tools=tools)
        answer = rows.value(index, output_key, option="output_key")
        return render_answer(renderer, given, answer, f"output_key={output_key}", tools=tools)

    def label(index: int) -> float:
        value = rows.value(index, label_key, option="label_key")
        if str(value).lower() not in _LABELS:
            raise ValueError(f"label_key={label_key} holds {value!r:.100}: a label is 1, 0, true or false")
        return _LABELS[str(value).lower()]

    labels = rows.collect(label)
    encoded = encode_pairs(tokenizer, rows.collect(render), apply_chat_template=apply_chat_template, rows=rows)

    def check(index: int) -> None:
        if not encoded[index][0]:
            raise ValueError(f"input_key={input_key} is empty: remove the row")

    rows.collect(check)
    sizes = [len(prompt) + len(answer) for prompt, answer in encoded]
    kept = [index for index, size in enumerate(sizes) if size <= max_len]
    if not kept:
        raise rows.all_too_long("max_len", max_len, shortest=min(sizes))
    pairs = [encoded[index] for index in kept]
    found = training_rows([prompt + answer for prompt, answer in pairs], [len(prompt) for prompt, _ in pairs])
    check_vocabulary(found.input_ids, np.cumsum(found.lengths), kept, tokenizer, rows=rows, vocab_size=vocab_size)
    partners = unmatched_answers(pairs, max_len=max_len)
    for place, partner in enumerate(partners):
        if partner is None:
            raise ValueError(
                f"{rows.place(kept[place])}: no answer to another prompt differs from those to its own and fits into "
                f"max_len={max_len} behind it (the KL is estimated with such answers): add rows, or raise max_len"
            )
    others = [pairs[place][0] + pairs[partner][1] for place, partner in enumerate(partners) if partner is not None]
    return SupervisedData(
        rows=found.with_fields({}, scalars={DESIRABLE: np.array([labels[i] for i in kept], dtype=np.float32)}),
        dropped={too_long(max_len): len(rows) - len(kept)},
        unmatched=training_rows(others, [len(prompt) for prompt, _ in pairs]),
    )


def unmatched_answers(pairs: list[tuple[list[int], list[int]]], *, max_len: int) -> list[int | None]:
    """For each prompt a pair whose answer is none of those to this prompt and fits behind it; None where there is none.

    The first that does from a drawn place on; drawn, for neighbours in a file often speak of the same.
    """
    own = defaultdict[tuple[int, ...], set[tuple[int, ...]]](set)
    for prompt, answer in pairs:
        own[tuple(prompt)].add(tuple(answer))
    starts = np.random.default_rng(0).integers(len(pairs), size=len(pairs))
    found: list[int | None] = []
    for (prompt, _), start in zip(pairs, starts.tolist(), strict=True):
        places = ((start + step) % len(pairs) for step in range(len(pairs)))
        room, answers = max_len - len(prompt), own[tuple(prompt)]
        fits = (place for place in places if len(pairs[place][1]) <= room and tuple(pairs[place][1]) not in answers)
        found.append(next(fits, None))
    return found


def balance_warning(data: SupervisedData, *, desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to say where the labels' weights times their numbers are far from balanced; arXiv:2402.01306 section 4.2.

    The paper keeps desirable over undesirable, weighted, between 1 and 4/3.
    """
    desirable = int(data.rows.scalars[DESIRABLE].sum())
    undesirable = len(data.rows) - desirable
    weighted = desirable * desirable_weight, undesirable * undesirable_weight
    if weighted[1] * _BALANCED[0] <= weighted[0] <= weighted[1] * _BALANCED[1]:
        return None
    said = (
        f"{desirable} desirable answers x desirable_loss_weight={desirable_weight:g} against {undesirable} undesirable "
        f"x undesirable_loss_weight={undesirable_weight:g} (KTO wants the former 1 to 4/3 times the latter)"
    )
    if not desirable or not undesirable:
        return f"{said}: add answers of the other label"
    return f"{said}: set desirable_loss_weight to {undesirable * undesirable_weight / desirable:.4g} or a third more"
