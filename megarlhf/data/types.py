"""The records that cross between phases: prompts, samples, rows and packed micro-batches.

Ragged sequences are flat: one array of all tokens behind one another, and the length of each. A mask is named for what
True selects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

KEPT_TOKENS = "kept_tokens"  # field of rows, [targets, k]: output-layer rows here that distributions are restricted to
FinishReason = Literal["stop", "length"]
Ints = NDArray[np.int64]
TokenIds = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One row of the prompt data, tokenized."""

    index: int  # row in the data file, stable across runs
    text: str  # rendered prompt, as the model reads it
    token_ids: TokenIds  # [p] tokens of `text`
    label: Any  # reference answer for the reward, any JSON value; None where the data has none
    chat: Any = None  # what a chat template has made `text` of: a string or messages; None without one
    tools: list[Any] | None = None  # JSON schemas of functions that it was given besides


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupTokens:
    """The tokens of one prompt's samples, as an inference engine generated them; sample by sample in both arrays."""

    prompt_ids: TokenIds  # [p]
    response_ids: TokenIds  # [sum of lengths] generated tokens, each response's stop token included
    rollout_log_probs: Floats  # [sum of lengths] log p of each of them, as the inference engine computed it
    lengths: Ints  # [n_samples] tokens of each response


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedGroup:
    """One prompt's samples as an inference engine gives them."""

    tokens: GroupTokens | None  # None where they travel by themselves
    lengths: Ints  # [n_samples] tokens of each response
    texts: list[str]  # decoded responses
    stop_texts: list[str]  # the stop token at the end of each text, where special tokens are in it
    finish_reasons: list[FinishReason]
    weight_version: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What scoring and planning need of one generated response; its tokens are in its group's GroupTokens."""

    prompt: Prompt
    group_id: int  # place of the prompt in its rollout batch; equal for the samples of one prompt
    sample_id: int  # 0 .. n_samples_per_prompt - 1 inside the group
    response_length: int  # generated tokens, the stop token included
    response_text: str  # decoded response; special tokens are in it with reward_skip_special_tokens=False
    finish_reason: FinishReason  # "stop": a stop token came; "length": cut at the limit
    weight_version: int  # policy version that generated it
    reward: float | None = None  # outcome reward; None: no result (never a silent 0)
    parts: Mapping[str, float | None] = field(default_factory=dict)  # of it, by source; more of a source by SOURCE/NAME
    stop_text: str = ""  # the stop token at the end of response_text, where special tokens are in it


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Samples of one step, and where their tokens are."""

    samples: list[Sample]
    tokens: tuple[Any, ...]  # by group_id: GroupTokens, or a reference to them that a training role can resolve


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRows:
    """Sequences for the engine.

    A row's targets are its tokens from its prompt_length on; "targets" below are those of all rows, row by row.
    """

    input_ids: TokenIds  # [sum of lengths] prompts and targets
    lengths: Ints  # [n] tokens of each row
    prompt_lengths: Ints  # [n] tokens before the first target, at least 1
    unit_ids: Ints  # [n] rows of one unit meet in one micro-batch; they may share the computation of their prompt
    loss_mask: NDArray[np.bool_] | None = None  # [targets] those that the loss looks at; None: all
    fields: Mapping[str, Floats] = field(default_factory=dict)  # name -> [targets] or [targets, k], such as advantages
    scalars: Mapping[str, Floats] = field(default_factory=dict)  # name -> [n], one number for all targets of a row

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_targets(self) -> Ints:
        """[n] targets of each row."""
        return self.lengths - self.prompt_lengths

    @property
    def num_loss_targets(self) -> Ints:
        """[n] targets of each row that the loss looks at."""
        if self.loss_mask is None:
            return self.num_targets
        before = np.append(0, np.cumsum(self.loss_mask))
        counts: Ints = before[self.target_starts + self.num_targets] - before[self.target_starts]
        return counts

    def count_loss_targets(self, indices: Ints) -> int:
        """Targets of these rows that the loss looks at; no other row is read."""
        counts = self.num_targets[indices]
        if self.loss_mask is None:
            return int(counts.sum())
        return int(self.loss_mask[spans(self.target_starts[indices], counts)].sum())

    @cached_property
    def token_starts(self) -> Ints:
        """[n] place of each row's first token in the flat tokens."""
        return starts_of(self.lengths)

    @cached_property
    def target_starts(self) -> Ints:
        """[n] place of each row's first target in the flat targets."""
        return starts_of(self.num_targets)

    @property
    def num_units(self) -> int:
        """Units, which are numbered 0, 1, ... in the order of their rows where a data set has been loaded."""
        return int(self.unit_ids[-1]) + 1 if len(self) else 0

    def of_units(self, units: Sequence[int] | Ints) -> Ints:
        """Indices of the rows of these units, unit by unit; the rows of a unit follow each other."""
        chosen = np.asarray(units, dtype=np.int64)
        first = np.searchsorted(self.unit_ids, chosen, side="left")
        return spans(first, np.searchsorted(self.unit_ids, chosen, side="right") - first)

    def take(self, indices: Sequence[int] | Ints) -> "TrainingRows":
        """The rows of these indices, in their order."""
        chosen = np.asarray(indices, dtype=np.int64)
        tokens = spans(self.token_starts[chosen], self.lengths[chosen])
        targets = spans(self.target_starts[chosen], self.num_targets[chosen])
        return TrainingRows(
            input_ids=self.input_ids[tokens],
            lengths=self.lengths[chosen],
            prompt_lengths=self.prompt_lengths[chosen],
            unit_ids=self.unit_ids[chosen],
            loss_mask=None if self.loss_mask is None else self.loss_mask[targets],
            fields={name: values[targets] for name, values in self.fields.items()},
            scalars={name: values[chosen] for name, values in self.scalars.items()},
        )

    def drawn(self, indices: Sequence[int] | Ints) -> "TrainingRows":
        """The rows of these indices, of which some may come more than once: then each time in a unit of its own."""
        chosen = np.asarray(indices, dtype=np.int64)
        order = np.argsort(chosen, kind="stable")
        _, counts = np.unique(chosen, return_counts=True)
        times = np.empty_like(chosen)  # how often the index has come before
        times[order] = spans(np.zeros_like(counts), counts)
        _, unit_ids = np.unique(np.stack([self.unit_ids[chosen], times]), axis=1, return_inverse=True)
        return replace(self.take(chosen), unit_ids=unit_ids.reshape(-1).astype(np.int64))

    def with_fields(
        self, fields: Mapping[str, Floats], *, scalars: Mapping[str, Floats] | None = None
    ) -> "TrainingRows":
        """The same rows with more fields and scalars, or others of the same names."""
        total = int(self.num_targets.sum())
        for given, expected in ((fields, total), (scalars or {}, len(self))):
            for name, values in given.items():
                assert len(values) == expected, f"{name} has {len(values)} values for {expected}"
        return replace(self, fields={**self.fields, **fields}, scalars={**self.scalars, **(scalars or {})})


def training_rows(
    input_ids: Sequence[Sequence[int] | TokenIds],
    prompt_lengths: Sequence[int],
    *,
    unit_ids: Sequence[int] | None = None,
    fields: Mapping[str, Sequence[Any]] | None = None,
) -> TrainingRows:
    """Rows from one sequence each.

    Args:
        unit_ids: of each row; None makes each a unit of its own.
        fields: name -> one array or tensor [num_targets] for each row.
    """
    lengths = np.fromiter(map(len, input_ids), dtype=np.int64, count=len(input_ids))
    prompts = np.asarray(prompt_lengths, dtype=np.int64)
    assert (prompts >= 1).all() and (prompts < lengths).all(), "a row needs a prompt token and a target"
    rows = TrainingRows(
        input_ids=np.concatenate([np.asarray(ids, dtype=np.int32) for ids in input_ids]),
        lengths=lengths,
        prompt_lengths=prompts,
        unit_ids=np.arange(len(lengths)) if unit_ids is None else np.asarray(unit_ids, dtype=np.int64),
    )
    joined = {}
    for name, values in (fields or {}).items():
        assert [len(value) for value in values] == rows.num_targets.tolist(), f"{name} has one number for each target"
        joined[name] = np.concatenate([np.asarray(value, dtype=np.float32) for value in values])
    return rows.with_fields(joined)


def starts_of(lengths: Ints) -> Ints:
    """Where each of the sequences of these lengths starts in their flat array."""
    return np.cumsum(lengths) - lengths


def spans(starts: Ints, lengths: Ints) -> Ints:
    """Indices of several runs, one run behind the other: starts[0], starts[0] + 1, ..., starts[1], ..."""
    within: Ints = np.arange(int(lengths.sum()))
    return within + np.repeat(starts - starts_of(lengths), lengths)


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetPlaces:
    """Where the targets of a micro-batch's rows lie, one run a row, in the order of the packed sequence."""

    rows: Ints  # [r] index among the rows that it was packed of
    positions: Ints  # [r] first position in the whole packed sequence
    starts: Ints  # [r] index of the first among the targets of those rows
    lengths: Ints  # [r]


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetValues:
    """Numbers of the targets of some rows of a batch, such as those that one rank computes."""

    starts: Ints  # [r] index of each row's first target among the targets of all rows
    lengths: Ints  # [r]
    values: Floats  # [sum of lengths] or [sum of lengths, k]

    @property
    def indices(self) -> Ints:
        """[sum of lengths] index of each among the targets of all rows."""
        return spans(self.starts, self.lengths)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows packed into one packed sequence.

    A segment is a run of tokens that attends causally to itself and, where it shares a prompt, to all of that
    prompt's segment as well. Under context parallelism the tensors are one rank's part of the packed sequence
    (parallel/context.py), while cu_seqlens, prefix_segments and places speak of the whole packed sequence.
    """

    tokens: Tensor  # [t] int64, inputs
    targets: Tensor  # [t] int64, the token each position predicts
    position_ids: Tensor  # [t] int64, place inside the sequence; continues after a shared prompt
    cu_seqlens: Tensor  # [num_segments + 1] int32, segment boundaries
    prefix_segments: tuple[int | None, ...]  # per segment: the segment it continues, None where it starts afresh
    target_mask: Tensor  # [t] bool, True where `targets` is a row's target that its loss looks at
    fields: dict[str, Tensor]  # name -> [t] or [t, k] float32, zero outside the rows' targets
    row_ids: Tensor  # [t] int64, the row whose target is predicted, an index among those packed of; -1 where none is
    places: TargetPlaces
    context_size: int = 1  # ranks that share the packed sequence
