"""Weights in shared memory: training goes on there as it would elsewhere, and readers see every step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarlhf.engine.sharing import SharedWeights
from megarlhf.formats import shared_memory
from megarlhf.trainers.parity_cases import (
    parity_case,
)
from tests.distributed.cases import make_rows, read_shared
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

Step = tuple[dict[str, Tensor], dict[str, Tensor]]  # HF weights: as streamed by the trainer, as read by others
CASES = {
    "one process": ("llama", SINGLE),
    "one process, distributed optimizer": ("llama", Layout(distributed_optimizer=True)),
    "bf16": ("llama", Layout(bf16=True)),
    "bf16, distributed optimizer": ("llama", Layout(bf16=True, distributed_optimizer=True)),
    "DP2": ("qwen2", LAYOUTS["DP2"]),
    "DP2-distopt": ("qwen3", LAYOUTS["DP2-distopt"]),
    "DP2-distopt-overlap": ("llama", LAYOUTS["DP2-distopt-overlap"]),
    "TP2-SP": ("llama", LAYOUTS["TP2-SP"]),
    "EP2-distopt": ("mixtral", MOE_LAYOUTS["EP2-distopt"]),
    "router bias in float32": ("deepseek-v3", replace(MOE_LAYOUTS["EP2"], bf16=True)),
}


def train(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, share: bool) -> list[Step]:
    """The weights after each of three steps; shared after the first if asked for, when the optimizer has a state."""
    steps: list[Step] = []
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        engine.keep_reference()
        for step in range(3):
            engine.train_step(make_rows(seed=step), parity_case("sft").objective, denominator=50.0)
            with engine.reference_weights():
                engine.log_probs(make_rows())
            if step == 0 and share:
                shared = SharedWeights(engine)
            read = read_shared(shared) if share else {}
            engine.finish_param_gather()
            steps.append(({name: tensor.clone() for name, tensor in engine.weights.iter_hf_weights()}, read))
    return steps


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_in_shared_memory(ranks: RankPool, tmp_path: Path, name: str) -> None:
    family, layout = CASES[name]
    model_dir = make_model(tmp_path / "model", family=family)
    alone = ranks.run(layout.world_size, train, layout, model_dir, False)
    found = ranks.run(layout.world_size, train, layout, model_dir, True)
    before: dict[str, Tensor] = {}
    for (expected, _), (streamed, read) in zip(alone[0], found[0], strict=True):
        assert set(read) == set(streamed) == set(expected)
        for tensor_name, tensor in expected.items():
            assert torch.equal(streamed[tensor_name], tensor), tensor_name
            assert torch.equal(read[tensor_name], tensor), tensor_name
        assert not before or any(not torch.equal(read[key], value) for key, value in before.items())
        before = read


def replaced(rank: int, world_size: int, init_method: str, model_dir: Path) -> list[dict[str, Tensor]]:
    """What readers see once a parameter has memory elsewhere, as a GPU's always has."""
    with world(SINGLE, rank, init_method):
        engine = build(SINGLE, model_dir, optimizer=False)
        shared = SharedWeights(engine)
        first = read_shared(shared)
        for _, parameter in engine.named_parameters():
            parameter.data = parameter.data + 1
        return [first, read_shared(shared)]


def test_weights_elsewhere_are_copied(ranks: RankPool, tmp_path: Path) -> None:
    ((before, after),) = ranks.run(1, replaced, make_model(tmp_path / "model"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor + 1, atol=0, rtol=0)


def too_large(rank: int, world_size: int, init_method: str, model_dir: Path) -> str:
    """The error where shared memory is almost full."""
    with world(LAYOUTS["DP2"], rank, init_method), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "free_shared_memory", lambda: 3000 + rank)
        with pytest.raises(ValueError) as caught:
            SharedWeights(build(LAYOUTS["DP2"], model_dir))
        return str(caught.value)


def test_too_little_shared_memory_is_said_by_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, too_large, make_model(tmp_path / "model"))
    assert first == second and "do not fit into /dev/shm, where 0.00 GiB are free" in first
