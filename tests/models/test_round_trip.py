"""HF -> Megatron -> HF changes no bit, in any layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarlhf.data.tensor_file import TensorFile
from tests.distributed.layouts import LATENT_LAYOUTS, LAYOUTS, MOE_LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

DENSE = {"TP1": SINGLE, **{n: LAYOUTS[n] for n in ("TP2", "PP2", "TP2-PP2", "PP2-VPP2", "CP2-p2p", "PP2-uneven")}}
MOE = {"TP1": SINGLE, **{n: MOE_LAYOUTS[n] for n in ("EP2", "TP2-SP", "TP2-SP-EP2-ETP1", "CP2-EP2", "PP2-VPP2")}}
MOE_FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe")
LATENT = {"TP1": SINGLE, **{n: LATENT_LAYOUTS[n] for n in ("EP2", "TP2-SP", "TP2-SP-EP2-ETP1", "CP2-p2p", "PP2-VPP2")}}
FAMILIES = [("llama", True), ("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", False)]
FAMILIES += [("gemma2", True), ("gemma3", True)]
CASES = [(family, tied, name) for family, tied in FAMILIES for name in DENSE]
CASES += [(family, False, name) for family in MOE_FAMILIES for name in MOE]
CASES += [(family, False, name) for family in ("deepseek-v2", "deepseek-v3") for name in LATENT]
ALL_LAYOUTS = DENSE | MOE | LATENT


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
        assert engine.write_weights(file) == file.checksum()
        return {name: tensor.numpy().tobytes() for name, tensor in engine.weights.iter_hf_weights()}


@pytest.mark.parametrize(("family", "tied", "name"), CASES)
def test_round_trip_is_bit_exact(ranks: RankPool, tmp_path: Path, family: str, tied: bool, name: str) -> None:
    layout = ALL_LAYOUTS[name]
    source = make_model(tmp_path / "model", family=family, tied=tied)
    target = tmp_path / "out.safetensors"
    streams = ranks.run(layout.world_size, round_trip, layout, source, target)
    expected, written = load_file(source / "model.safetensors"), load_file(target)
    assert set(written) == set(expected)
    for tensor_name, tensor in expected.items():
        assert torch.equal(written[tensor_name], tensor), tensor_name
        for stream in streams:
            assert stream[tensor_name] == tensor.numpy().tobytes(), tensor_name
