"""Micro-batches: how rows lie in one packed sequence.

Two layouts. Alone, a row is one segment of all its tokens but the last, each predicting the next. Shared, the rows of a
unit use one copy of their prompt: a segment of the prompt but for its last token, then a segment per row of that
last token and the response but for its own last. So every target has a position of its own, and a unit of rows
costs (prompt_length - 1) + the sum of their num_targets positions.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarlhf.data.planning import members_of
from megarlhf.data.types import Floats, Ints, MicroBatch, TargetPlaces, TargetValues, TrainingRows, spans, starts_of


def pack_rows(
    rows: TrainingRows,
    indices: Sequence[int],
    *,
    share_prefix: bool,
    pad_to_multiple: int = 1,
    context_size: int = 1,
    min_length: int = 1,
) -> MicroBatch:
    """Lay rows out in one packed sequence; their fields come later, by `fill_fields`.

    Padding, up to a multiple of `pad_to_multiple`, is a last segment of token 0 without targets; it attends to itself
    alone. Without any indices the whole sequence is such padding. Under context parallelism each segment is padded as
    well, at its end, to a multiple of the number of its chunks.

    Args:
        indices: the rows to pack, in any order; those of one unit are brought together.
        share_prefix: lay out the rows of a unit behind one copy of their prompt, where it has two tokens.
        pad_to_multiple: what sequence parallelism divides a rank's part of the packed sequence by.
        min_length: pad the packed sequence at least to this many positions.
        context_size: ranks that are to share the packed sequence; without share_prefix only (see parallel/context.py).
    """
    assert context_size == 1 or not share_prefix, "segments that share a prompt are not cut over context ranks"
    segment_multiple = 1 if context_size == 1 else 2 * context_size
    segments, prefixes = _segments(rows, indices, share_prefix=share_prefix)
    sources, lengths, firsts, owners = segments.T
    padded = -(-lengths // segment_multiple) * segment_multiple
    multiple = math.lcm(segment_multiple, pad_to_multiple * context_size)
    used = int(padded.sum())
    padding = -(-max(used, min_length) // multiple) * multiple - used
    begins, total = starts_of(padded), used + padding

    tokens, targets = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    copy_runs(rows.input_ids, sources, lengths, tokens, begins)
    copy_runs(rows.input_ids, sources + 1, lengths, targets, begins)
    if padding:
        padded, firsts = np.append(padded, padding), np.append(firsts, 0)
    own_rows = owners[owners >= 0]
    counts = rows.num_targets[own_rows]
    positions = (begins + lengths)[owners >= 0] - counts
    starts = rows.target_starts[own_rows]
    places = TargetPlaces(rows=own_rows, positions=positions, starts=starts, lengths=counts)
    row_ids = np.full(total, -1, dtype=np.int64)
    copy_runs(np.repeat(own_rows, counts), starts_of(counts), counts, row_ids, positions)
    target_mask = row_ids >= 0
    if rows.loss_mask is not None:
        copy_runs(rows.loss_mask, starts, counts, target_mask, positions)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(spans(firsts, padded)),
        cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(padded)).astype(np.int32)),
        prefix_segments=(*prefixes, *([None] if padding else [])),
        target_mask=torch.from_numpy(target_mask),
        fields={},
        row_ids=torch.from_numpy(row_ids),
        places=places,
    )


def fill_fields(batch: MicroBatch, rows: TrainingRows) -> MicroBatch:
    """What `pack_rows` made of `rows`, with their fields and scalars as [t] or [t, k] tensors; 0 outside targets."""
    places = batch.places
    fields = {name: _spread(batch, values, places.starts) for name, values in rows.fields.items()}
    for name, values in rows.scalars.items():
        fields[name] = _spread(batch, np.repeat(values[places.rows], places.lengths), starts_of(places.lengths))
    return replace(batch, fields=fields)


def lengthened(batch: MicroBatch, length: int) -> MicroBatch:
    """A whole packed sequence with so many positions, by one more segment of padding.

    Args:
        length: at least its own, and a multiple of what it was padded to.
    """
    more = length - len(batch.tokens)
    if not more:
        return batch

    def padded(values: Tensor, value: int = 0) -> Tensor:
        return torch.cat([values, values.new_full((more, *values.shape[1:]), value)])

    return replace(
        batch,
        tokens=padded(batch.tokens),
        targets=padded(batch.targets),
        position_ids=torch.cat([batch.position_ids, torch.arange(more)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor([length])]),
        prefix_segments=(*batch.prefix_segments, None),
        target_mask=padded(batch.target_mask),
        fields={name: padded(values) for name, values in batch.fields.items()},
        row_ids=padded(batch.row_ids, -1),
    )


def _spread(batch: MicroBatch, values: Floats, starts: Ints) -> Tensor:
    """Values of targets, those of each row from one of `starts` on, at their positions; 0 elsewhere."""
    packed = np.zeros((len(batch.tokens), *values.shape[1:]), dtype=np.float32)
    copy_runs(values, starts, batch.places.lengths, packed, batch.places.positions)
    return torch.from_numpy(packed)


def gather_targets(batch: MicroBatch, values: Tensor) -> TargetValues:
    """Values of the rows' targets, such as log-probs, out of values [t] or [t, k] of the whole packed sequence."""
    places = batch.places
    assert len(values) == len(batch.tokens), f"values {list(values.shape)} of a sequence of {len(batch.tokens)}"
    found = np.empty((int(places.lengths.sum()), *values.shape[1:]), dtype=np.float32)
    copy_runs(values.float().numpy(), places.positions, places.lengths, found, starts_of(places.lengths))
    return TargetValues(starts=places.starts, lengths=places.lengths, values=found)


def add_values(batches: Sequence[MicroBatch], name: str, values: TargetValues) -> list[MicroBatch]:
    """Whole packed sequences with one more field.

    Args:
        values: of all of these sequences' targets, one after another, as `join_values` of their
            `gather_targets`; empty where a rank does not compute them, which leaves the sequences as they are.
    """
    if not len(values.values) and any(len(batch.places.rows) for batch in batches):
        return list(batches)
    filled, left = [], values.values
    for batch in batches:
        field = _spread(batch, left, starts_of(batch.places.lengths))
        left = left[int(batch.places.lengths.sum()) :]
        filled.append(replace(batch, fields=batch.fields | {name: field}))
    return filled


def join_values(parts: Sequence[TargetValues]) -> TargetValues:
    """Values of several micro-batches of the same rows."""
    none = np.empty(0, dtype=np.int64)
    return TargetValues(
        starts=np.concatenate([none, *(part.starts for part in parts)]),
        lengths=np.concatenate([none, *(part.lengths for part in parts)]),
        values=np.concatenate([part.values for part in parts]) if parts else np.empty(0, dtype=np.float32),
    )


def copy_runs(
    source: NDArray[Any], source_starts: Ints, lengths: Ints, target: NDArray[Any], target_starts: Ints
) -> None:
    """target[b : b + length] = source[a : a + length] for each run."""
    for a, length, b in zip(source_starts.tolist(), lengths.tolist(), target_starts.tolist(), strict=True):
        target[b : b + length] = source[a : a + length]


def _segments(rows: TrainingRows, indices: Sequence[int], *, share_prefix: bool) -> tuple[Ints, list[int | None]]:
    """Runs of tokens that follow one another in the packed sequence, before padding.

    Returns:
        [s, 4] place of the first token in the rows' flat tokens, length, position of the first token in its sequence,
        row whose targets are predicted (-1 for a prompt); and for each the number of the segment that it continues.
    """
    segments: list[tuple[int, int, int, int]] = []
    prefixes: list[int | None] = []
    row_starts = rows.token_starts
    for unit in members_of(rows.unit_ids[list(indices)]) if indices else []:
        members = [indices[place] for place in unit]
        prefix, own = None, 0
        if share_prefix and len(members) > 1 and rows.prompt_lengths[members[0]] >= 2:
            _check_prompts(rows, row_starts, members)
            prefix, own = len(segments), int(rows.prompt_lengths[members[0]]) - 1
            segments.append((int(row_starts[members[0]]), own, 0, -1))
            prefixes.append(None)
        for row in members:
            segments.append((int(row_starts[row]) + own, int(rows.lengths[row]) - 1 - own, own, row))
            prefixes.append(prefix)
    return np.array(segments, dtype=np.int64).reshape(-1, 4), prefixes


def _check_prompts(rows: TrainingRows, row_starts: Ints, unit: list[int]) -> None:
    """Rows that share a prompt's computation begin with the same prompt."""
    size = int(rows.prompt_lengths[unit[0]])
    prompts = [rows.input_ids[int(row_starts[row]) : int(row_starts[row]) + size] for row in unit]
    same = all(np.array_equal(prompt, prompts[0]) for prompt in prompts)
    assert same and (rows.prompt_lengths[unit] == size).all(), f"rows {unit} of one unit begin with different prompts"
