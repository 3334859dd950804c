"""HF -> Megatron -> HF changes no bit, in any layout."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megarlhf.engine.sharing import SharedWeights
from megarlhf.formats.safetensors_file import TensorFiles, create_tensor_file
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


Tensors = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Trip:
    """What one rank has done with a model."""

    streamed: Tensors  # by iter_hf_weights
    order: list[str]  # of the table
    shared: Tensors  # as read from all ranks' memory
    sent_bytes: int  # of the stream
    held_bytes: int  # handed out by this rank


def round_trips(rank: int, world_size: int, init_method: str, layout: Layout, sources: list[Path]) -> list[Trip]:
    """Load each model, write a file from every rank, stream the weights, and read them from the ranks' memory."""
    with world(layout, rank, init_method):
        return [round_trip(rank, layout, source) for source in sources]


def round_trip(rank: int, layout: Layout, source: Path) -> Trip:
    import torch.distributed as dist

    engine, target = build(layout, source, optimizer=False), source / "out.safetensors"
    if rank == 0:
        create_tensor_file(target, engine.weights.tensor_specs(engine.source_dtypes))
    dist.barrier()
    with TensorFiles([target], specs=engine.weights.tensor_specs(engine.source_dtypes)) as file:
        engine.weights.write(file)
    sent_bytes, exchange = 0, dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> Any:
        nonlocal sent_bytes
        sent_bytes += sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return exchange(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counted)
        streamed = {name: tensor.numpy().tobytes() for name, tensor in engine.weights.iter_hf_weights()}
    shared = SharedWeights(engine)
    return Trip(
        streamed=streamed,
        order=engine.weights.hf_names(),
        shared={name: tensor.numpy().tobytes() for name, tensor in read_shared(shared).items()},
        sent_bytes=sent_bytes,
        held_bytes=sum(math.prod(p.size) * b.dtype.itemsize for b in shared.blocks for p in b.pieces),
    )


class RoundTrips:
    """Results by layout: a world is set up once for all models that are tried in it."""

    def __init__(self, ranks: RankPool, root: Path) -> None:
        self._ranks, self._root = ranks, root
        self._found: dict[str, dict[tuple[str, bool], list[Trip]]] = {}

    def directory(self, family: str, tied: bool, name: str) -> Path:
        """Where the model lies, and what the ranks have written of it."""
        return self._root / f"{family}-{tied}-{name}"

    def found(self, family: str, tied: bool, name: str) -> list[Trip]:
        """By rank."""
        if name not in self._found:
            models = [(family, tied) for family, tied, layout in CASES if layout == name]
            sources = [
                make_model(self.directory(family, tied, name), family=family, tied=tied) for family, tied in models
            ]
            by_rank = self._ranks.run(ALL_LAYOUTS[name].world_size, round_trips, ALL_LAYOUTS[name], sources)
            self._found[name] = dict(zip(models, map(list, zip(*by_rank, strict=True)), strict=True))
        return self._found[name][family, tied]


@pytest.fixture(scope="module")
def trips(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> RoundTrips:
    return RoundTrips(ranks, tmp_path_factory.mktemp("round_trips"))


@pytest.mark.parametrize(("family", "tied", "name"), CASES)
def test_round_trip_is_bit_exact(trips: RoundTrips, family: str, tied: bool, name: str) -> None:
    found, directory = trips.found(family, tied, name), trips.directory(family, tied, name)
    expected, written = load_file(directory / "model.safetensors"), load_file(directory / "out.safetensors")
    assert set(written) == set(expected) and all(set(trip.shared) == set(expected) for trip in found)
    for tensor_name, tensor in expected.items():
        assert torch.equal(written[tensor_name], tensor), tensor_name
        assert found[0].streamed[tensor_name] == tensor.numpy().tobytes(), tensor_name
        assert all(trip.shared[tensor_name] == tensor.numpy().tobytes() for trip in found), tensor_name
    first, *others = found
    assert list(first.streamed) == first.order and first.sent_bytes == 0
    assert all(not trip.streamed and trip.sent_bytes == trip.held_bytes > 0 for trip in others), "each number once"
    assert sum(trip.held_bytes for trip in found) == sum(tensor.nbytes for tensor in expected.values())
