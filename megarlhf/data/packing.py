"""Micro-batches: how rows lie in one packed sequence.

Two layouts. Alone, a row is one segment of all its tokens but the last, each predicting the next. Shared, the rows of a
unit use one copy of their prompt: a segment of the prompt but for its last token, then a segment per row of that
last token and the response but for its own last. So every target has a position of its own, and a unit of rows
costs (prompt_length - 1) + the sum of their num_targets positions.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megarlhf.data.planning import members_of
from megarlhf.data.types import Ints, MicroBatch, TargetPlaces, TargetValues, TrainingRows, starts_of


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
        rows: all rows of the plan.
        indices: the rows to pack, in any order; those of one unit are brought together.
        share_prefix: lay out the rows of a unit behind one copy of their prompt, where it has two tokens.
        pad_to_multiple: what sequence parallelism divides a rank's part of the packed sequence by.
        min_length: pad the packed sequence at least to this many positions.
        context_size: ranks that are to share the packed sequence; without share_prefix only (see parallel/context.py).
    """
    assert context_size == 1 or not share_prefix, "segments that share a prompt are not cut over context ranks"
    segment_multiple = 1 if context_size == 1 else 2 * context_size
    row_starts = starts_of(rows.lengths)
    segments = _Segments()
    for unit in members_of(rows.unit_ids[list(indices)]) if indices else []:
        members = [indices[place] for place in unit]
        prefix, start = None, 0
        if share_prefix and len(members) > 1 and rows.prompt_lengths[members[0]] >= 2:
            _check_prompts(rows, row_starts, members)
            start = int(rows.prompt_lengths[members[0]]) - 1
            prefix = segments.add(int(row_starts[members[0]]), start, position=0, prefix=None, row=-1)
        for row in members:
            segments.add(
                int(row_starts[row]) + start,
                int(rows.lengths[row]) - 1 - start,
                position=start,
                prefix=prefix,
                row=row,
            )
    lengths = np.array(segments.lengths, dtype=np.int64)
    padded = -(-lengths // segment_multiple) * segment_multiple
    multiple = math.lcm(segment_multiple, pad_to_multiple * context_size)
    total = max(int(padded.sum()), min_length)
    padding = -(-total // multiple) * multiple - int(padded.sum())
    return _line(rows, segments, lengths, padded, padding)


def fill_fields(batch: MicroBatch, rows: TrainingRows) -> MicroBatch:
    """A packed sequence with the fields and scalars of its rows as [t] or [t, k] tensors; 0 outside the targets.

    Args:
        batch: the whole packed sequence, as `pack_rows` made it of `rows`.
    """
    places, length = batch.places, int(batch.cu_seqlens[-1])
    fields = {}
    for name, values in rows.fields.items():
        packed = np.zeros((length, *values.shape[1:]), dtype=np.float32)
        for _, position, start, size in _runs(places):
            packed[position : position + size] = values[start : start + size]
        fields[name] = torch.from_numpy(packed)
    for name, values in rows.scalars.items():
        packed = np.zeros(length, dtype=np.float32)
        for row, position, _, size in _runs(places):
            packed[position : position + size] = values[row]
        fields[name] = torch.from_numpy(packed)
    return replace(batch, fields=fields)


def gather_targets(batch: MicroBatch, values: Tensor) -> TargetValues:
    """Values of the rows' targets, such as log-probs, out of values of the whole packed sequence.

    Args:
        values: [t] on the CPU.
    """
    length = int(batch.cu_seqlens[-1])
    assert values.shape == (length,), f"values {list(values.shape)} of a packed sequence of {length}"
    packed, places = values.float().numpy(), batch.places
    parts = [packed[position : position + size] for _, position, _, size in _runs(places)]
    return TargetValues(starts=places.starts, lengths=places.lengths, values=np.concatenate([packed[:0], *parts]))


def add_values(batches: Sequence[MicroBatch], name: str, values: TargetValues) -> list[MicroBatch]:
    """Whole packed sequences with one more field.

    Args:
        values: of all of these sequences' targets, one after another, as `join_values` of their
            `gather_targets`; empty where a rank has none, which leaves the sequences as they are.
    """
    if not len(values.values):
        return list(batches)
    filled, first = [], 0
    for batch in batches:
        packed = torch.zeros(int(batch.cu_seqlens[-1]))
        for _, position, _, size in _runs(batch.places):
            packed[position : position + size] = torch.from_numpy(values.values[first : first + size])
            first += size
        filled.append(replace(batch, fields=batch.fields | {name: packed}))
    return filled


def join_values(parts: Sequence[TargetValues]) -> TargetValues:
    """Values of several micro-batches of the same rows."""
    none, empty = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    return TargetValues(
        starts=np.concatenate([none, *(part.starts for part in parts)]),
        lengths=np.concatenate([none, *(part.lengths for part in parts)]),
        values=np.concatenate([empty, *(part.values for part in parts)]),
    )


def _runs(places: TargetPlaces) -> list[tuple[int, int, int, int]]:
    """Row, first position, first target and length of each run."""
    columns = (places.rows, places.positions, places.starts, places.lengths)
    return list(zip(*(column.tolist() for column in columns), strict=True))


class _Segments:
    """Runs of tokens that follow one another in a packed sequence, before padding."""

    def __init__(self) -> None:
        self.starts: list[int] = []  # of the inputs, in the rows' flat tokens
        self.lengths: list[int] = []
        self.positions: list[int] = []  # of the first token in its sequence
        self.prefixes: list[int | None] = []
        self.rows: list[int] = []  # whose targets are predicted; -1 for a prompt

    def add(self, start: int, length: int, *, position: int, prefix: int | None, row: int) -> int:
        """Append a segment; returns its number."""
        self.starts.append(start)
        self.lengths.append(length)
        self.positions.append(position)
        self.prefixes.append(prefix)
        self.rows.append(row)
        return len(self.prefixes) - 1


def _line(
    rows: TrainingRows,
    segments: _Segments,
    lengths: Ints,
    padded: Ints,
    padding: int,
) -> MicroBatch:
    """The sequence of these segments, each padded to its length in `padded`, with `padding` positions behind."""
    begins, total = starts_of(padded), int(padded.sum()) + padding
    tokens, targets, positions = (np.zeros(total, dtype=np.int64) for _ in range(3))
    for begin, source, length, size, first in zip(
        begins.tolist(), segments.starts, segments.lengths, padded.tolist(), segments.positions, strict=True
    ):
        tokens[begin : begin + length] = rows.input_ids[source : source + length]
        targets[begin : begin + length] = rows.input_ids[source + 1 : source + 1 + length]
        positions[begin : begin + size] = np.arange(first, first + size)
    if padding:
        positions[total - padding :] = np.arange(padding)
        padded = np.append(padded, padding)
    owners = np.array(segments.rows, dtype=np.int64)
    own = owners[owners >= 0]
    counts = rows.num_targets[own]
    places = TargetPlaces(
        rows=own,
        positions=(begins + lengths)[owners >= 0] - counts,
        starts=starts_of(rows.num_targets)[own],
        lengths=counts,
    )
    row_ids, target_mask = np.full(total, -1, dtype=np.int64), np.zeros(total, dtype=np.bool_)
    for row, position, start, size in _runs(places):
        row_ids[position : position + size] = row
        looked_at = True if rows.loss_mask is None else rows.loss_mask[start : start + size]
        target_mask[position : position + size] = looked_at
    boundaries = np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(boundaries),
        prefix_segments=(*segments.prefixes, *([None] if padding else [])),
        target_mask=torch.from_numpy(target_mask),
        fields={},
        row_ids=torch.from_numpy(row_ids),
        places=places,
    )


def _check_prompts(rows: TrainingRows, row_starts: Ints, unit: list[int]) -> None:
    """Rows that share a prompt's computation begin with the same prompt."""
    size = int(rows.prompt_lengths[unit[0]])
    prompts = [rows.input_ids[int(row_starts[row]) : int(row_starts[row]) + size] for row in unit]
    same = all(np.array_equal(prompt, prompts[0]) for prompt in prompts)
    assert same and (rows.prompt_lengths[unit] == size).all(), f"rows {unit} of one unit begin with different prompts"
