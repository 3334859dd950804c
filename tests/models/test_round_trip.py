"""HF -> Megatron -> HF changes no bit, in any layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarlhf.data.tensor_file import TensorFile
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

ROUND_TRIPS = {"TP1": SINGLE, **{name: LAYOUTS[name] for name in ("TP2", "PP2", "TP2-PP2")}}


def round_trip(
    rank: int, world_size: int, init_method: str, layout: Layout, source: Path, target: Path
) -> dict[str, bytes]:
    """Load, write a weight file from every rank, and stream the same weights."""
    import torch.distributed as dist

    with world(layout, rank, init_method):
        engine = build(layout, source, optimizer=False)
        if rank == 0:
            TensorFile.create(target, engine.weights.tensor_specs(torch.float32)).close()
        dist.barrier()
        file = TensorFile.open(target, writable=True)
        engine.weights.write(file)
        dist.barrier()
        return {name: tensor.numpy().tobytes() for name, tensor in engine.weights.iter_hf_weights()}


@pytest.mark.parametrize("layout", ROUND_TRIPS)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def test_round_trip_is_bit_exact(ranks: RankPool, tmp_path: Path, layout: str, family: str, tied: bool) -> None:
    source = make_model(tmp_path / "model", family=family, tied=tied)
    target = tmp_path / "out.safetensors"
    streams = ranks.run(ROUND_TRIPS[layout].world_size, round_trip, ROUND_TRIPS[layout], source, target)
    expected, written = load_file(source / "model.safetensors"), load_file(target)
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
        for stream in streams:
            assert stream[name] == tensor.numpy().tobytes(), name
