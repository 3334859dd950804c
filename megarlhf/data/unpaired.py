"""Rows of single answers that are labelled as desirable or not."""

from collections import defaultdict
from functools import partial

import numpy as np

from megarlhf.data.answers import encode_pairs, load_answers, render_row
from megarlhf.data.row_options import RowOptions
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import training_rows

DESIRABLE = "desirable"
UNMATCHED = "with no unmatched answer that fits"
_LABELS = {"1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0, "true": 1.0, "false": 0.0}
_BALANCED = (0.9, 1.5)  # [1, 4/3] and a tenth on both sides


def load_labelled_rows(
    options: RowOptions, *, input_key: str, output_key: str | None, label_key: str
) -> SupervisedData:
    """Read, render and tokenize labelled answers; arguments as for `load_sft_rows`, and:

    Args:
        label_key: column that holds 1 or true for a desirable answer, 0 or false for another.
    Returns:
        Rows, each a unit of its own, with the scalar `desirable`, 1 or 0. `unmatched` holds, for each, its prompt with
        an answer of another row that is none of those to this prompt, drawn by a fixed seed. A row whose prompt no such
        answer fits behind is dropped and counted, and so is one longer than `max_len`.
    Raises:
        ValueError: a missing or empty value, a label that is none, a tokenizer without EOS, every row too long or
            without an unmatched answer, or a token that the model has no embedding for.
    """
    renderer, rows = options.renderer, load_answers(options, input_key, output_key, label_key)

    def label(index: int) -> float:
        value = rows.value(index, label_key, option="label_key")
        if str(value).lower() not in _LABELS:
            raise ValueError(f"label_key={label_key} holds {value!r:.100}: a label is 1, 0, true or false")
        return _LABELS[str(value).lower()]

    labels = rows.collect(label)
    texts = rows.collect(partial(render_row, renderer, rows, input_key=input_key, output_key=output_key))
    encoded = encode_pairs(renderer, texts, rows=rows)
    short = options.fitting(rows, {index: len(prompt) + len(ids) for index, (prompt, ids) in enumerate(encoded)})
    found = unmatched_answers([encoded[index] for index in short], max_len=options.max_len)
    options.check_tokens(rows, training_rows([encoded[i][0] + encoded[i][1] for i in short], [1] * len(short)), short)
    partners = {index: short[place] for index, place in zip(short, found, strict=True) if place is not None}
    if not partners:
        raise ValueError(
            f"{rows.path}: for none of {len(short)} rows an answer to another prompt differs from those to its own and "
            f"fits into max_len={options.max_len} behind it (the KL is estimated with such answers): add rows, or "
            "raise max_len"
        )
    matched, unmatched = (
        training_rows([encoded[i][0] + encoded[j][1] for i, j in pairs], [len(encoded[i][0]) for i, _ in pairs])
        for pairs in ([(index, index) for index in partners], list(partners.items()))
    )
    scalars = {DESIRABLE: np.array([labels[index] for index in partners], dtype=np.float32)}
    return SupervisedData(
        rows=matched.with_fields({}, scalars=scalars),
        dropped={options.too_long: len(rows) - len(short), UNMATCHED: len(short) - len(partners)},
        unmatched=unmatched,
    )


def unmatched_answers(pairs: list[tuple[list[int], list[int]]], *, max_len: int) -> list[int | None]:
    """For each prompt a pair whose answer is none of those to this prompt and fits behind it; None where there is none.

    The first that does from a drawn place on; drawn, for neighbours in a file often speak of the same.
    """
    own = defaultdict[tuple[int, ...], set[tuple[int, ...]]](set)
    for prompt, answer in pairs:
        own[tuple(prompt)].add(tuple(answer))
    shortest = min(len(answer) for _, answer in pairs)
    starts = np.random.default_rng(0).integers(len(pairs), size=len(pairs))
    found: list[int | None] = []
    for (prompt, _), start in zip(pairs, starts.tolist(), strict=True):
        room, answers = max_len - len(prompt), own[tuple(prompt)]
        places = ((start + step) % len(pairs) for step in range(len(pairs) if room >= shortest else 0))
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
