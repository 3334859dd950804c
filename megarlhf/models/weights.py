"""HF weights into a rank's Megatron parameters, and out again."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megarlhf.formats.huggingface import HFConfig, HFWeights
from megarlhf.formats.safetensors_file import TensorFiles, TensorSpec
from megarlhf.models.arch import ArchSpec, Split, WeightMap
from megarlhf.models.build import Head
from megarlhf.models.four_bit import dense
from megarlhf.models.names import is_tied, model_maps, model_shapes
from megarlhf.models.shards import Shard, shards_of
from megarlhf.parallel.groups import Ranks, all_gather_objects


@dataclass(frozen=True, kw_only=True)
class LocalWeight:
    """A local Megatron parameter or buffer with its entry in the table."""

    name: str  # Megatron's name with the global layer and expert number
    param: Any  # Parameter with Megatron's attributes, or buffer
    weight: WeightMap
    exported: bool  # False for the last stage's copy of a tied embedding

    @property
    def data(self) -> Tensor:
        """Its numbers; of a weight in 4 bits those that it stands for, in new memory."""
        return dense(self.param)


class ModelWeights:
    """The weights of one model as this rank holds them, with HF names.

    Args:
        chunks: this rank's parts of the model: one, or several under the interleaved pipeline schedule.
    Raises:
        ValueError: a Megatron parameter that the table does not know, or one of the table that its layers lack.
    """

    def __init__(self, chunks: Sequence[Any], arch: ArchSpec, hf: HFConfig, ranks: Ranks, *, head: Head) -> None:
        self.arch, self.hf, self.ranks, self.head = arch, hf, ranks, head
        self.tied = is_tied(hf, head)
        self.maps = model_maps(arch, hf, head)
        self.local = self._bind(chunks)

    def _bind(self, chunks: Sequence[Any]) -> list[LocalWeight]:
        by_name = {name: weight for weight in self.maps for name in weight.megatron}
        copies = {"output_layer.weight": by_name["embedding.word_embeddings.weight"]} if self.tied else {}
        known = by_name | copies
        num_experts = self.arch.dimensions(self.hf).get("experts", 0) // self.ranks.ep_size
        first_expert = self.ranks.ep_rank * num_experts
        tensors = {name: t for chunk in chunks for name, t in _named_tensors(chunk, first_expert)}
        unknown = [name for name, t in tensors.items() if name not in known and isinstance(t, torch.nn.Parameter)]
        if unknown:
            raise ValueError(f"{self.arch.hf_class}: Megatron parameters without an entry in the table: {unknown}")
        local = [
            LocalWeight(name=name, param=tensor, weight=known[name], exported=name in by_name)
            for name, tensor in tensors.items()
            if name in known
        ]
        layers = {layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers}
        experts = {None, *range(first_expert, first_expert + num_experts)}
        expected = {w.hf for w in self.maps if w.layer_number in layers and w.expert_number in experts}
        absent = expected - {entry.weight.hf for entry in local}
        if absent:
            raise ValueError(f"{self.arch.hf_class}: entries of the table without a Megatron parameter: {absent}")
        for entry in local:
            _mark_parallel(entry)
        return local

    def shards(self, local: LocalWeight, data: Tensor) -> list[Shard]:
        """Where the HF tensors' parts lie in `data`, which is shaped as the parameter: itself, or its gradient."""
        ranks, expert = self.ranks, local.weight.expert
        rank, size = (ranks.etp_rank, ranks.etp_size) if expert else (ranks.tp_rank, ranks.tp_size)
        return shards_of(local.weight, data, self.hf, tp_rank=rank, tp_size=size)

    def hf_names(self) -> list[str]:
        """Every HF tensor of the whole model, in the table's order."""
        return [name for weight in self.maps for name in weight.hf]

    @torch.no_grad()
    def load(self, source: HFWeights) -> None:
        """Fill this rank's parameters, reading only its own slices.

        A value head without a tensor in the source keeps its drawn weights: a critic may start from a causal LM.

        Args:
            source: with the tensors that check_names asks for.
        """
        drawn = {"score.weight"} - set(source.names())
        for local in self.local:
            data = local.param.data
            if local.weight.split is Split.VOCAB:
                data.zero_()
            for shard in self.shards(local, data):
                if shard.view.numel() and shard.hf_name not in drawn:
                    shard.store(source.read(shard.hf_name, shard.index))

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every HF tensor, from the configuration alone."""
        return model_shapes(self.arch, self.hf, self.head)

    def tensor_specs(self, dtypes: Mapping[str, torch.dtype]) -> list[TensorSpec]:
        """Layout of a whole HF weight file with these dtypes, wider ones first, as the format has them aligned."""
        specs = [TensorSpec(name, shape, dtypes[name]) for name, shape in self.hf_shapes.items()]
        return sorted(specs, key=lambda spec: -spec.dtype.itemsize)

    def owned_weights(self, *, share: bool = True) -> list[LocalWeight]:
        """This rank's share of the weights: all ranks' shares together are the whole model, each number once.

        Args:
            share: of n ranks with the same weights each has every n-th; else the first has them all.
        """
        ranks = self.ranks
        exported = [local for local in self.local if local.exported]
        experts = [local for local in exported if local.weight.expert]
        others = [local for local in exported if not local.weight.expert]
        mine = _share(others, ranks.replica_rank, ranks.replica_size if share else None)
        mine += _share(experts, ranks.expert_replica_rank, ranks.expert_replica_size if share else None)
        return [local for local in mine if local.weight.split is not Split.REPLICATED or ranks.tp_rank == 0]

    @torch.no_grad()
    def write(self, file: TensorFiles) -> None:
        """Write this rank's share into a weight file that all ranks have open; the caller syncs it, then a barrier."""
        for shard in self._owned_shards():
            file.write(shard.hf_name, shard.view, shard.index)

    def _owned_shards(self) -> Iterator[Shard]:
        shards = (shard for local in self.owned_weights() for shard in self.shards(local, local.data))
        return (shard for shard in shards if shard.view.numel())

    @torch.no_grad()
    def iter_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole HF tensors one after another, in the table's order, on rank 0 of the world; nothing on other ranks.

        For transports that take a stream of tensors. Each number is sent once, by the rank that hands it out, and no
        rank holds more than one tensor and its parts beside its weights. All ranks iterate, and to the end: a rank
        that stops leaves the others waiting. The caller settles the engine before.
        """
        own = {shard.hf_name: shard for shard in self._owned_shards()}
        parts: dict[str, dict[int, _Part]] = defaultdict(dict)
        for rank, held in enumerate(all_gather_objects({name: (s.index, s.view.dtype) for name, s in own.items()})):
            for name, part in held.items():
                parts[name][rank] = part
        for name, shape in self.hf_shapes.items():
            if self.ranks.world_rank == 0:
                yield name, _received(shape, parts[name], own.get(name), device=self.local[0].param.device)
            elif name in own:
                _exchange([dist.P2POp(dist.isend, own[name].view.contiguous(), 0)])


def _share(weights: list[LocalWeight], rank: int, num_ranks: int | None) -> list[LocalWeight]:
    """A rank's of the same weights on several; None: the first has them all."""
    if num_ranks is None:
        return weights if rank == 0 else []
    return weights[rank::num_ranks]


_Part = tuple[tuple[slice, ...], torch.dtype]  # place in the HF tensor, and the type of its numbers


def _received(shape: tuple[int, ...], parts: Mapping[int, _Part], own: Shard | None, *, device: torch.device) -> Tensor:
    """Rank 0's side: a whole tensor of the parts that ranks hold, `own` being rank 0's."""
    (dtype,) = {dtype for _, dtype in parts.values()}
    whole = torch.empty(shape, dtype=dtype, device=device)
    places = {rank: whole[index] for rank, (index, _) in parts.items()}
    assert sum(place.numel() for place in places.values()) == whole.numel(), "each number is handed out once"
    if own is not None:
        own.emit(whole)
    others = {rank: place for rank, place in places.items() if rank != 0}
    buffers = {rank: place.contiguous() for rank, place in others.items()}  # the place itself where it is contiguous
    _exchange([dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in buffers.items()])
    for rank, place in others.items():
        if buffers[rank] is not place:
            place.copy_(buffers[rank])
    return whole


def _exchange(operations: list[dist.P2POp]) -> None:
    """Send and receive, and wait for all; one communicator of the whole world carries them where that is NCCL's."""
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()


def _mark_parallel(local: LocalWeight) -> None:
    """Say which parameters are cut over tensor parallelism.

    Megatron-Core says so only while it initialises weights itself, which the engine skips; the gradient norm counts an
    unmarked parameter on one rank alone.
    """
    if local.weight.split is not Split.REPLICATED or local.weight.expert:
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(local.param, name):
                delattr(local.param, name)
        set_tensor_model_parallel_attributes(local.param, True, int(local.weight.split is Split.ROW), 1)


_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc\d\.weight))(\d+)")


def _named_tensors(chunk: Any, first_expert: int) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, with layer and expert numbers of the whole model."""
    for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        yield _EXPERT.sub(lambda match: f"{match[1]}{first_expert + int(match[2])}", ".".join(parts)), tensor
