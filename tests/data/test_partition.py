"""A step's rows on their ranks: every sample once, with its own tokens, and every number back in its place."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarlhf.data.packing import gather_targets, join_values, pack_rows
from megarlhf.data.partition import DataParallelSplit, RankRows, rows_of
from megarlhf.data.planning import PackingOptions
from megarlhf.data.types import Floats, GroupTokens, Prompt, Sample


class Step(NamedTuple):
    """Samples of some groups, some of them missing, and the tokens of all."""

    samples: list[Sample]
    tokens: tuple[GroupTokens, ...]

    def ids(self, index: int) -> list[int]:
        sample = self.samples[index]
        return [*sample.prompt.token_ids, *response(sample.group_id, sample.sample_id, sample.response_length)]


def response(group: int, sample: int, length: int) -> list[int]:
    """Tokens that name their sample and place."""
    return [10_000 * (group + 1) + 100 * sample + place for place in range(length)]


def log_prob(token: int) -> float:
    return -token / 64


@st.composite
def steps(draw: st.DrawFn) -> Step:
    samples, tokens = [], []
    for group in range(draw(st.integers(1, 5))):
        prompt = np.arange(draw(st.integers(1, 5)), dtype=np.int32) + 10 * group
        lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
        ids = [token for number, length in enumerate(lengths) for token in response(group, number, length)]
        tokens.append(
            GroupTokens(
                prompt_ids=prompt,
                response_ids=np.array(ids, dtype=np.int32),
                rollout_log_probs=np.array([log_prob(token) for token in ids], dtype=np.float32),
                lengths=np.array(lengths),
            )
        )
        record = Prompt(index=group, text="", token_ids=prompt, label=None)
        for number, length in enumerate(lengths):
            if draw(st.booleans()) or not samples:
                samples.append(
                    Sample(
                        **{"prompt": record, "group_id": group, "sample_id": number, "response_length": length},
                        **{"response_text": "", "finish_reason": "stop", "weight_version": 0},
                    )
                )
    return Step(samples, tuple(tokens))


def split_mini_batches(count: int, num_mini_batches: int) -> list[list[int]]:
    """All of the samples, in turn and backwards."""
    return [list(range(count))[::-1][first::num_mini_batches] for first in range(min(count, num_mini_batches))]


@given(steps(), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 30), st.sampled_from([1, 2]))
def test_every_sample_is_on_one_rank_with_its_tokens_and_its_numbers(
    step: Step, num_mini_batches: int, num_ranks: int, share_prefix: bool, room: int, multiple: int
) -> None:
    longest = max(len(step.ids(index)) for index in range(len(step.samples)))
    packing = PackingOptions(
        max_tokens=longest + room, share_prefix=share_prefix, per_rank_multiple=multiple, one_length=multiple > 1
    )
    mini_batches = split_mini_batches(len(step.samples), num_mini_batches)
    split = DataParallelSplit(step.samples, mini_batches, num_ranks=num_ranks, packing=packing)
    assert sorted(np.concatenate(split.rows).tolist()) == list(range(len(step.samples)))
    everything = [token for index in range(len(step.samples)) for token in step.ids(index)[-split.num_targets[index] :]]
    whole, per_row = np.array(everything, dtype=np.float32), np.arange(len(step.samples), dtype=np.float32)
    computed: list[Floats] = []
    for rank, (partition, indices) in enumerate(zip(split.partitions, split.rows, strict=True)):
        rows = rank_rows(step, partition, packing)
        assert rows.rows.input_ids.tolist() == [token for index in indices for token in step.ids(index)]
        rows.keep({"tokens": split.scatter(whole)[rank]}, scalars={"index": split.scatter(per_row, per_row=True)[rank]})
        assert len(partition.plan) == len(mini_batches)
        for number, mini_batch in enumerate(mini_batches):
            batches = rows.batches(number)
            assert len(batches) % multiple == 0
            found = sorted(int(indices[row]) for batch in batches for row in set(batch.places.rows))
            assert found == sorted(set(mini_batch) & set(indices.tolist()))
            for batch in batches:
                mask = batch.target_mask
                assert batch.fields["tokens"][mask].tolist() == batch.targets[mask].tolist()
                expected = [log_prob(token) for token in batch.targets[mask].tolist()]
                assert batch.fields["rollout_log_probs"][mask].tolist() == expected
                assert batch.fields["index"][mask].tolist() == indices[batch.row_ids[mask].numpy()].tolist()
        lines = rows.batches()
        assert len(lines) == sum(map(len, partition.plan)) and not any(line.fields for line in lines)
        if multiple > 1:
            assert len({len(line.tokens) for line in lines}) == 1
        values = [gather_targets(line, 2 * line.targets) for line in lines][::-1]  # in any order
        computed.append(rows.keep_values("double", join_values(values)))
    assert split.gather(computed).tolist() == (2 * whole).tolist()
    for counts in ([len(micro_batches) for micro_batches in own.plan] for own in split.partitions):
        assert counts == [len(micro_batches) for micro_batches in split.partitions[0].plan]


def rank_rows(step: Step, partition: object, packing: PackingOptions) -> RankRows:
    def pack(rows: object, indices: Sequence[int], min_length: int) -> object:
        return pack_rows(rows, indices, share_prefix=packing.share_prefix, min_length=min_length)  # type: ignore[arg-type]

    tokens = [step.tokens[group] for group in partition.groups]  # type: ignore[attr-defined]
    return RankRows(partition, tokens, pack, one_length=packing.one_length)  # type: ignore[arg-type]


def test_a_rank_without_rows_packs_padding() -> None:
    prompt = np.array([1, 2], dtype=np.int32)
    sample = Sample(
        **{"prompt": Prompt(index=0, text="", token_ids=prompt, label=None), "group_id": 0, "sample_id": 0},
        **{"response_length": 1, "response_text": "", "finish_reason": "stop", "weight_version": 0},
    )
    packing = PackingOptions(max_tokens=9, share_prefix=True)
    split = DataParallelSplit([sample], [[0]], num_ranks=2, packing=packing)
    (empty,) = [partition for partition in split.partitions if not len(partition.groups)]
    rows = RankRows(empty, [], partial(_pack), one_length=False)
    (line,) = rows.batches(0)
    assert line.tokens.tolist() == [0] and not line.target_mask.any()
    assert len(rows_of(empty, [])) == 0
    assert split.gather(split.scatter(np.array([7.0], dtype=np.float32))).tolist() == [7.0]
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch=1"):
        DataParallelSplit([sample], [[0]], num_ranks=2, packing=PackingOptions(max_tokens=1, share_prefix=True))


def _pack(rows: object, indices: Sequence[int], min_length: int) -> object:
    return pack_rows(rows, indices, share_prefix=True, min_length=min_length)  # type: ignore[arg-type]
