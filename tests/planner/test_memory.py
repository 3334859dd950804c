"""Bytes of a rank: hand-worked numbers, and peaks that others have measured and published."""

from dataclasses import replace
from typing import Any

import pytest

from megarlhf.data.model_sizes import ChunkSizes, LayerWidths
from megarlhf.planner.memory import (
    RankBytes,
    Work,
    buffer_numbers,
    chunks_in_flight,
    gathered_bytes,
    layer_bytes,
    logits_bytes,
    offloaded_numbers,
    optimizer_bytes,
    rank_bytes,
)
from tests.plans import WORK

GIB = 2**30
# Korthikanti's counts for a GPT with dropout, arXiv:2205.05198: 34 s b h bytes, 10 of them between the matrices.
GPT = LayerWidths(hidden=1, whole=5, attention=4, dense=8, shared=0, experts_per_token=0, expert=0)
LLAMA_70B = LayerWidths(
    hidden=8192,
    whole=4 * 8192,
    attention=2 * (8192 + 1024),
    dense=3 * 28672,
    shared=0,
    experts_per_token=0,
    expert=0,
)
LLAMA_70B_LAYER = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672) + 2 * 8192


def work(**changes: Any) -> Work:
    return replace(WORK, **changes)


def chunk(*numbers: int, layers: int = 0, experts: tuple[int, ...] = (), moe_layers: int = 0) -> ChunkSizes:
    return ChunkSizes(dense=numbers, experts=experts, buffers=0, dense_layers=layers, moe_layers=moe_layers)


def static(taken: RankBytes) -> int:
    return taken.parameters + taken.gradients + taken.optimizer


@pytest.mark.parametrize(
    ("bf16", "replicas", "distributed", "expected"),
    [
        # docs/dist_optimizer.md of Megatron-LM: 18 bytes a parameter, 6 + 12 / d with the distributed optimizer;
        (True, 1, False, 18),
        (True, 4, False, 18),
        (True, 4, True, 6 + 12 / 4),
        (True, 48, True, 6 + 12 / 48),
        # float32 16, and 8 + 8 / d.
        (False, 8, False, 16),
        (False, 8, True, 8 + 8 / 8),
    ],
)
def test_static_bytes_of_a_parameter(bf16: bool, replicas: int, distributed: bool, expected: float) -> None:
    numbers = 3 * 128 * 1000
    asked = work(bf16=bf16, replicas=replicas, distributed_optimizer=distributed)
    assert static(rank_bytes([[chunk(numbers)]], GPT, asked, stage=0)) == numbers * expected


def test_padding_of_the_buffer() -> None:
    assert buffer_numbers([100, 64, 3], replicas=4, distributed_optimizer=False) == 167
    assert buffer_numbers([100, 64, 3], replicas=4, distributed_optimizer=True) == 256  # 128 + 64 + 64
    assert buffer_numbers([100, 64, 3], replicas=3, distributed_optimizer=True) == 384  # a multiple of 3 x 128
    assert buffer_numbers([], replicas=3, distributed_optimizer=True) == 0
    assert optimizer_bytes(384, bf16=True, replicas=3, distributed_optimizer=True) == 12 * 128


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.25, 256 + 500), (0.6, 1024), (1.0, 1024)])
def test_numbers_on_the_host(fraction: float, expected: int) -> None:
    """A parameter of 500 may lie across the border."""
    assert offloaded_numbers([500, 300], 1024, fraction) == expected


def test_what_is_stepped_on_the_host_leaves_the_device() -> None:
    asked = work(replicas=4, expert_replicas=2, distributed_optimizer=True, offload_fraction=1.0)
    taken = rank_bytes([[chunk(8 * 128, experts=(4 * 128,))]], GPT, asked, stage=0)
    assert (taken.optimizer, taken.host_optimizer) == (0, 16 * (2 * 128 + 2 * 128))
    asked = work(replicas=4, distributed_optimizer=True, offload_fraction=0.5)
    half = rank_bytes([[chunk(8 * 128)]], GPT, asked, stage=0)
    assert (half.optimizer, half.host_optimizer) == (12 * 128, 16 * 256)


def test_a_checkpoint_gathers_buffer_after_buffer() -> None:
    """1,000 numbers, 1,024 with padding, of two ranks: on the device all of one kind beside the rank's own."""

    def gathered(replicas: int, *, offloaded: bool = False, collects: bool = False) -> tuple[int, int]:
        return gathered_bytes([600, 400], 1024, replicas, offloaded=offloaded, collects=collects)

    whole = 12 * 1000 + 8 * 1024
    assert gathered(2) == gathered(2, collects=True) == (4 * (1024 + 512), 12 * 512 + whole)
    assert (gathered(2, offloaded=True), gathered(2, offloaded=True, collects=True)) == ((0, 6144), (0, 6144 + whole))
    assert gathered(1) == gathered(1, offloaded=True, collects=True) == (0, 12 * 1000)
    asked = work(replicas=2, expert_replicas=1, distributed_optimizer=True)
    taken = rank_bytes([[chunk(1024, experts=(512,))]], GPT, asked, stage=0)
    assert taken.gathered == 4 * (1024 + 512)
    assert taken.host_gathered == taken.parameters + 12 * (1024 + 512) + 8 * 1024 + 12 * 512
    assert rank_bytes([[chunk(1024)]], GPT, work(replicas=2), stage=0).gathered == 0


def test_experts_have_replicas_of_their_own() -> None:
    asked = work(replicas=8, expert_replicas=2, distributed_optimizer=True, has_reference=True)
    taken = rank_bytes([[chunk(8 * 128, experts=(4 * 128,))]], GPT, asked, stage=0)
    assert taken.optimizer == 12 * (128 + 2 * 128)
    assert (taken.parameters, taken.gradients, taken.reference) == (2 * 1536, 4 * 1536, 2 * 1536)


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "expected"),
    [(1, False, 34), (8, False, 10 + 24 / 8), (8, True, 34 / 8)],
)
def test_activations_of_korthikanti(tensor: int, sequence_parallel: bool, expected: float) -> None:
    asked = work(tensor=tensor, sequence_parallel=sequence_parallel)
    assert layer_bytes(GPT, asked, experts=False) == 1000 * expected


def test_a_layer_of_llama_70b_keeps_what_a_gpt_does() -> None:
    assert layer_bytes(LLAMA_70B, WORK, experts=False) == 1000 * 8192 * 33.5


def test_experts_of_a_layer() -> None:
    """8 of 128 experts of width 768, hidden 2048: 8 x (2 x 2048 + 3 x 768) numbers a token instead of a dense part."""
    widths = LayerWidths(
        hidden=2048, whole=8192, attention=10240, dense=99, shared=0, experts_per_token=8, expert=3 * 768
    )
    assert layer_bytes(widths, WORK, experts=True) == 2 * 1000 * (8192 + 10240 + 8 * (4096 + 2304))
    both = work(tensor=2, expert_tensor=2, sequence_parallel=True)  # each rank sees both ranks' tokens, half as wide
    assert layer_bytes(widths, both, experts=True) == 2 * 1000 * ((8192 + 10240) // 2 + 8 * (4096 + 1152))


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stage", "micro_batches", "expected"),
    [
        (1, 1, 0, 9, 1),
        (4, 1, 0, 9, 4),
        (4, 1, 3, 9, 1),
        (4, 1, 0, 2, 2),
        (4, 2, 0, 8, 2 * 3 + 4 + 1),
        (4, 2, 3, 8, 5),
        (4, 8, 0, 8, 8 * 4 * (1 + 3 / 32)),
    ],
)
def test_passes_in_flight(pipeline: int, virtual: int, stage: int, micro_batches: int, expected: int) -> None:
    asked = work(pipeline=pipeline, virtual=virtual, micro_batches=micro_batches)
    assert chunks_in_flight(asked, stage) == expected


@pytest.mark.parametrize(
    ("changes", "layers_kept", "inputs_kept"),
    [
        ({}, 8, 0),
        ({"recompute": "selective"}, 8, 0),  # attention keeps no scores to begin with
        ({"recompute": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 1, 8),
        ({"recompute": "full", "recompute_method": "uniform", "recompute_num_layers": 4}, 4, 2),
        ({"recompute": "full", "recompute_method": "block", "recompute_num_layers": 6}, 2 + 1, 6),
    ],
)
def test_recomputation(changes: dict[str, Any], layers_kept: int, inputs_kept: int) -> None:
    taken = rank_bytes([[chunk(1, layers=8)]], GPT, work(**changes), stage=0)
    last_hidden = 2 * 2 * 1000  # before the output layer
    assert taken.backward == 1000 * (34 * layers_kept + 2 * inputs_kept) + last_hidden
    assert taken.forward == 1000 * 34 + last_hidden


def test_one_chunk_of_logits() -> None:
    assert logits_bytes(work(vocabulary=128256, tensor=4, tokens=16384)) == 2048 * 32064 * (4 + 2)
    assert logits_bytes(work(vocabulary=512, bf16=False, tokens=100)) == 100 * 512 * 4
    first, last = (
        rank_bytes([[chunk(1)], [chunk(1)]], GPT, work(vocabulary=512, pipeline=2), stage=stage) for stage in (0, 1)
    )
    assert (first.logits, last.logits) == (0, 1000 * 512 * 6)


# Published peaks (shared/reference/published_training.csv). They have whole logits: 10 bytes of each, vocabulary / tp.


def test_llama_70b_of_12_layers_on_b200_tp2() -> None:
    """Row X02: 60.68 GiB."""
    numbers = [LLAMA_70B_LAYER // 2] * 12 + [128256 * 8192 // 2] * 2
    asked = work(tensor=2, sequence_parallel=True, replicas=4, distributed_optimizer=True, tokens=4096)
    taken = rank_bytes([[chunk(*numbers, layers=12)]], LLAMA_70B, asked, stage=0)
    logits = 10 * 4096 * 128256 // 2
    assert (static(taken) + taken.backward + logits) / GIB == pytest.approx(60.68, rel=0.005)


def test_llama_70b_of_12_layers_on_b200_pp2() -> None:
    """Row X01: 66.55 GiB, on the first stage."""
    numbers = [LLAMA_70B_LAYER] * 6 + [128256 * 8192]
    asked = work(pipeline=2, replicas=4, distributed_optimizer=True, tokens=4096, micro_batches=4)
    stages = [[chunk(*numbers, layers=6)]] * 2
    taken = rank_bytes(stages, LLAMA_70B, asked, stage=0)
    assert (static(taken) + taken.backward) / GIB == pytest.approx(66.55, rel=0.04)


def test_gpt_7b_on_h100() -> None:
    """Rows G01 (TP4: 57.14 GB) and G02 (PP4, VPP8: 60.72 GB), with 5% for what lies between tensors.

    Megatron's formula, with dropout; logits are on the last stage, which G02's first does not have.
    """
    hidden, layer = 4096, 4096 * (2 * 4096 + 2 * 1024 + 2 * 16384)
    widths = replace(GPT, hidden=hidden, whole=5 * hidden, attention=4 * hidden, dense=8 * hidden)
    numbers = [layer // 4] * 32 + [131584 * hidden // 4] * 2
    asked = work(tensor=4, replicas=2, distributed_optimizer=True, tokens=2 * 8192)
    taken = rank_bytes([[chunk(*numbers, layers=32)]], widths, asked, stage=0)
    assert static(taken) / 1e9 == pytest.approx(20.66, rel=0.03)
    assert 1.05 * (static(taken) + taken.backward) / 1e9 == pytest.approx(57.14, rel=0.01)
    asked = work(pipeline=4, virtual=8, replicas=2, distributed_optimizer=True, tokens=8192, micro_batches=4)
    first = [chunk(layer, 131073 * hidden, layers=1), *[chunk(layer, layers=1)] * 7]
    taken = rank_bytes([first, first, first, first], widths, asked, stage=0)
    assert static(taken) / 1e9 == pytest.approx(24.81, rel=0.065)
    assert 1.05 * (static(taken) + taken.backward) / 1e9 == pytest.approx(60.72, rel=0.1)


def test_mixtral_on_h100() -> None:
    """Row G07: TP2 PP4 VPP8 EP8 ETP1, 35.51 GB; 19.74 allocated before the step, 5.8% above the sum of its tensors."""
    dense, expert = 4096 * (2 * 4096 + 2 * 1024) // 2 + 8 * 4096, 3 * 4096 * 14336
    part = chunk(dense, experts=(expert,), moe_layers=1)
    first = [chunk(dense, 32000 * 4096 // 2, experts=(expert,), moe_layers=1), *[part] * 7]
    widths = LayerWidths(
        hidden=4096,
        whole=4 * 4096,
        attention=2 * (4096 + 1024),
        dense=3 * 14336,
        shared=0,
        experts_per_token=2,
        expert=3 * 14336,
    )
    asked = work(
        tensor=2, pipeline=4, virtual=8, sequence_parallel=True, replicas=8, expert_replicas=2, tokens=4096,
        distributed_optimizer=True, micro_batches=32,
    )  # fmt: skip
    taken = rank_bytes([first, [part] * 8, [part] * 8, [part] * 8], widths, asked, stage=0)
    assert static(taken) / 1e9 == pytest.approx(19.74, rel=0.06)
    assert (static(taken) + taken.backward) / 1e9 == pytest.approx(35.51, rel=0.06)
