"""HF -> Megatron -> HF changes no bit, in any layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarlhf.data.tensor_file import TensorFile
from megarlhf.engine.sharing import SharedWeights
from tests.distributed.cases import read_shared
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
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Load, write a weight file from every rank, stream the same weights, and read them from the ranks' memory."""
    import torch.distributed as dist

    with world(layout, rank, init_method):
        engine = build(layout, source, optimizer=False)
        if rank == 0:
            TensorFile.create(target, engine.weights.tensor_specs(engine.source_dtypes)).close()
        dist.barrier()
        engine.weights.write(TensorFile.open(target, writable=True))
        stream = {name: tensor.numpy().tobytes() for name, tensor in engine.weights.iter_hf_weights()}
        return stream, {name: tensor.numpy().tobytes() for name, tensor in read_shared(SharedWeights(engine)).items()}


@pytest.mark.parametrize(("family", "tied", "name"), CASES)
def test_round_trip_is_bit_exact(ranks: RankPool, tmp_path: Path, family: str, tied: bool, name: str) -> None:
    layout = ALL_LAYOUTS[name]
    source = make_model(tmp_path / "model", family=family, tied=tied)
    target = tmp_path / "out.safetensors"
    found = ranks.run(layout.world_size, round_trip, layout, source, target)
    expected, written = load_file(source / "model.safetensors"), load_file(target)
    assert all(set(names) == set(expected) for names in (written, *(shared for _, shared in found)))
    for tensor_name, tensor in expected.items():
        assert torch.equal(written[tensor_name], tensor), tensor_name
        for stream, shared in found:
            assert stream[tensor_name] == shared[tensor_name] == tensor.numpy().tobytes(), tensor_name
