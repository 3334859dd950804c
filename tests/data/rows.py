"""Rows for the tests of planning, packing and partitioning, and options for those of loading."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from megarlhf.data.row_options import RowOptions
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import TrainingRows, training_rows

COMMON: dict[str, Any] = {
    **{"apply_chat_template": False, "input_template": None},
    **{"max_len": 100, "max_samples": None, "vocab_size": 1000},
}


def load_with(
    loader: Callable[..., SupervisedData], path: str, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> SupervisedData:
    """What a loader makes of a file; settings that it does not take itself are those of RowOptions."""
    names = {field.name for field in fields(RowOptions)}
    common = COMMON | {name: value for name, value in settings.items() if name in names}
    own = {name: value for name, value in settings.items() if name not in names}
    return loader(RowOptions(source=path, tokenizer=tokenizer, **common), **own)


Row = tuple[list[int], list[int], int]  # prompt, response, unit_id


def make_rows(rows: Sequence[Row], *, scales: Sequence[float] | None = None) -> TrainingRows:
    """Rows whose field `advantages` counts 1, 2, ... in each, times its scale."""
    factors = scales or [1.0] * len(rows)
    return training_rows(
        [[*prompt, *response] for prompt, response, _ in rows],
        [len(prompt) for prompt, _, _ in rows],
        unit_ids=[unit for _, _, unit in rows],
        fields={
            "advantages": [
                [factor * (place + 1) for place in range(len(response))]
                for (_, response, _), factor in zip(rows, factors, strict=True)
            ]
        },
    )


def packed_length(rows: TrainingRows, indices: Sequence[int], *, share_prefix: bool) -> int:
    """Positions that rows take when packed together: every token that predicts, shared prompts once a unit."""
    if not share_prefix:
        return sum(int(rows.lengths[index]) - 1 for index in indices)
    prompts = {int(rows.unit_ids[index]): int(rows.prompt_lengths[index]) - 1 for index in indices}
    return sum(prompts.values()) + sum(int(rows.lengths[index] - rows.prompt_lengths[index]) for index in indices)


@st.composite
def ragged_rows(draw: st.DrawFn) -> list[Row]:
    """Up to five groups with prompts of their own."""
    rows: list[Row] = []
    for group in range(draw(st.integers(1, 5))):
        prompt = [10 * group + place for place in range(draw(st.integers(1, 6)))]
        lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
        rows += [(prompt, list(range(100 + length, 100 + 2 * length)), group) for length in lengths]
    return draw(st.permutations(rows))
