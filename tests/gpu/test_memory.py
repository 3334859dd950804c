"""Sleeping on the device: it gets the bytes of the memory table back, and training afterwards is equal bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.roles import PARTS
from megarlhf.formats.huggingface import read_checkpoint
from megarlhf.models.names import padded_vocab_size
from megarlhf.models.registry import find_architecture
from megarlhf.models.sizes import layer_widths, stage_sizes
from megarlhf.parallel.device import device_kind
from megarlhf.planner.memory import RankBytes, rank_bytes
from tests.distributed.layouts import SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.engine.test_memory import DISTRIBUTED, VARIANTS, alone, give_back, trained
from tests.gpu.devices import on_cpu_and_gpu, on_gpu
from tests.plans import WORK
from tests.tiny_models import make_model

ONE_PROCESS = [name for name, (_, layout) in VARIANTS.items() if layout.world_size == 1]
LAYOUTS = {
    "fp32": DISTRIBUTED,
    "bf16": replace(SINGLE, bf16=True),
    "bf16, distributed optimizer": replace(DISTRIBUTED, bf16=True),
}


def planned(model_dir: Path, layout: Layout) -> RankBytes:
    """What `--dry-run` counts for one process."""
    hf, _ = read_checkpoint(model_dir)
    arch = find_architecture(hf)
    work = replace(
        WORK,
        bf16=layout.bf16,
        distributed_optimizer=layout.distributed_optimizer,
        tokens=layout.max_tokens,
        micro_batches=1,
        vocabulary=padded_vocab_size(hf.vocab_size, 1),
        logprob_chunk_tokens=7,
        has_reference=True,
    )
    return rank_bytes(stage_sizes(arch, hf, LayoutArguments(), head="lm"), layer_widths(arch, hf), work, stage=0)


def check_given_back(ranks: RankPool, model_dir: Path, layout: Layout) -> None:
    """Of each part by itself: what the device has more than before."""
    table = planned(model_dir, layout)
    for part, (counted, freed) in ranks.run(1, give_back, layout, model_dir)[0].items():
        expected = getattr(table, part)
        assert expected > 40e6 and counted == pytest.approx(expected, rel=1e-3), part
        if device_kind() == "gpu":
            assert freed >= expected, part  # the allocator's blocks are at least as large as what lies in them
        else:
            assert freed == pytest.approx(expected, rel=0.1), part


@on_cpu_and_gpu
def test_the_device_gets_the_bytes_of_the_table(ranks: RankPool, tmp_path: Path, device: str) -> None:
    model_dir = make_model(tmp_path / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=3)
    check_given_back(ranks, model_dir, LAYOUTS["fp32"])


@on_gpu
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "fp32"])
def test_the_device_gets_the_bytes_of_other_layouts(ranks: RankPool, tmp_path: Path, device: str, name: str) -> None:
    model_dir = make_model(tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    check_given_back(ranks, model_dir, LAYOUTS[name])


@contextmanager
def in_one_order() -> Iterator[None]:
    """Sums in the same order each time, which a GPU does not promise by itself.

    Not with warn_only: attention's backward pass would then go on splitting keys as it likes.
    """
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def trained_in_one_order(
    rank: int, world_size: int, init_method: str, variant: str, model_dir: Path, sleepy: bool
) -> list[dict[str, Tensor]]:
    """`trained`, on the host."""
    with in_one_order():
        steps = trained(rank, world_size, init_method, variant, model_dir, sleepy)
    return [{name: tensor.cpu() for name, tensor in step.items()} for step in steps]


@on_gpu
@pytest.mark.parametrize("variant", ONE_PROCESS)
def test_training_is_equal_bit_for_bit_after_any_sleeps(
    ranks: RankPool, tmp_path: Path, device: str, variant: str
) -> None:
    """On the CPU tests/engine has it."""
    model_dir = make_model(tmp_path / "model")
    awake, again, slept = (
        ranks.run(1, trained_in_one_order, variant, model_dir, sleepy)[0] for sleepy in (False, False, True)
    )
    for expected, repeated, found in zip(awake, again, slept, strict=True):
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(repeated[name], tensor), f"{name}: also without sleeps"
            assert torch.equal(found[name], tensor), name
    moved = [name for name, tensor in awake[0].items() if not torch.equal(tensor, awake[-1][name])]
    assert len(moved) > 5, "the steps do something"


@on_gpu
@pytest.mark.parametrize("variant", ONE_PROCESS)
def test_each_part_sleeps_and_wakes_alone(ranks: RankPool, tmp_path: Path, device: str, variant: str) -> None:
    ranks.run(1, alone, variant, make_model(tmp_path / "model"))


def pinned(rank: int, world_size: int, init_method: str, model_dir: Path) -> None:
    """Whether host copies of what sleeps are pinned."""
    with world(SINGLE, rank, init_method):
        engine = build(SINGLE, model_dir)
        engine.sleep(*PARTS)
        copies = list(vars(engine.memory)["_host"]["parameters"].values())
        assert copies and all(copy.is_pinned() for copy in copies)


@on_gpu
def test_host_copies_are_pinned(ranks: RankPool, tmp_path: Path, device: str) -> None:
    ranks.run(1, pinned, make_model(tmp_path / "model"))
