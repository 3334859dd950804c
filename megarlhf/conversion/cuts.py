"""How Megatron-Core names a model's weights in a distributed checkpoint and cuts them for a layout.

Nothing here repeats what Megatron-Core knows: each rank's model is built in a fake world, without any numbers, and
asked for its sharded state.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

from megarlhf.config.layouts import LayoutArguments
from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import ArchSpec, WeightMap
from megarlhf.models.build import Head, ModelOptions, build_model
from megarlhf.models.weights import ModelWeights
from megarlhf.parallel.groups import ParallelSizes, fake_world


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GlobalWeight:
    """One Megatron parameter of the whole model, as a box of a tensor of the checkpoint.

    The tensor may hold the parameters of all layers or experts, stacked along leading axes.
    """

    weight: WeightMap
    key: str
    tensor_shape: tuple[int, ...]
    region: Region
    num_stacked: int  # leading axes, along which the region has one element
    chunks: tuple[Region, ...]  # that make up the region in this layout
    stage: int  # the first pipeline stage that holds it

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter itself."""
        return self.region.shape[self.num_stacked :]

    @property
    def num_elements(self) -> int:
        """Numbers in it, vocabulary padding included."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class CutModel:
    """A model in one layout."""

    names: ModelWeights  # of the first rank: the table of names and HF shapes; its tensors hold no numbers
    weights: list[GlobalWeight]  # in HF order
    objects: dict[str, Any]  # what Megatron-Core stores besides tensors, by key


def _merged(weight: WeightMap, stage: int, parts: dict[tuple[int, ...], ShardedTensor]) -> GlobalWeight:
    """What the ranks hold of one parameter, by offset, and the box around it all."""
    first = next(iter(parts.values()))
    stacked, axes = first.prepend_axis_num, range(len(first.global_shape))
    chunks = [Region(offset=o, shape=(1,) * stacked + tuple(t.local_shape)) for o, t in parts.items()]
    start = tuple(min(chunk.offset[axis] for chunk in chunks) for axis in axes)
    end = tuple(max(chunk.offset[axis] + chunk.shape[axis] for chunk in chunks) for axis in axes)
    return GlobalWeight(
        weight=weight,
        key=first.key,
        tensor_shape=tuple(first.global_shape),
        region=Region(offset=start, shape=tuple(e - s for s, e in zip(start, end, strict=True))),
        num_stacked=stacked,
        chunks=tuple(chunks),
        stage=stage,
    )


def cut_model(
    arch: ArchSpec, hf: HFConfig, *, head: Head, tensor: int = 1, pipeline: int = 1, expert: int = 1
) -> CutModel:
    """What every rank of a layout together holds.

    Raises:
        ValueError: the layout does not fit the model.
    """
    _check_layout(arch, hf, tensor=tensor, pipeline=pipeline, expert=expert)
    without_rope = copy.copy(hf)
    without_rope.rope_parameters = {}  # positions cut no weight, and Megatron-Core may lack the model's kind
    sizes = ParallelSizes(tensor=tensor, pipeline=pipeline, expert=expert)
    found: dict[tuple[str, ...], tuple[int, dict[tuple[int, ...], ShardedTensor]]] = {}  # first stage, parts
    objects: dict[str, Any] = {}
    names: ModelWeights | None = None
    world_size = tensor * pipeline * expert
    # Sequence parallelism cuts no weight, and some models cannot be built without.
    options = ModelOptions(layout=LayoutArguments(sequence_parallel=tensor > 1))
    for rank in range(world_size):
        with fake_world(sizes, rank=rank, world_size=world_size) as ranks:
            chunks, _ = build_model(arch, without_rope, ranks, options, head=head, seed=0)
            weights = ModelWeights(chunks, arch, hf, ranks, head=head)
            names = names or weights
            exported = {id(local.param): local.weight for local in weights.local if local.exported}
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            sharding = {"singleton_local_shards": False, "dp_cp_group": group}
            for entry in nested_values(chunks[0].sharded_state_dict(metadata=sharding)):
                if isinstance(entry, ShardedObject):
                    objects[entry.unique_key] = entry.data
                elif id(entry.data) in exported:
                    weight = exported[id(entry.data)]
                    parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
                    _, whole = found.setdefault(weight.hf, (ranks.pp_rank, {}))
                    whole.update({part.global_offset: part for part in parts})
    assert names is not None
    return CutModel(
        names=names,
        weights=[_merged(weight, *found[weight.hf]) for weight in arch.weight_maps(hf, tied=names.tied, head=head)],
        objects=objects,
    )


def _check_layout(arch: ArchSpec, hf: HFConfig, *, tensor: int, pipeline: int, expert: int) -> None:
    """Raises ValueError naming every size of the layout that the model's heads, layers or experts do not fit."""
    sizes = arch.dimensions(hf)
    layers = {name: sizes[name] for name in ("ffn", "expert", "shared") if sizes.get(name)}
    heads = {name: getattr(hf, name) for name in ("num_attention_heads", "num_key_value_heads")}
    rules: dict[str, tuple[int, dict[str, int]]] = {
        "tensor": (tensor, heads | {f"{name} feed-forward size": size for name, size in layers.items()}),
        "pipeline": (pipeline, {"num_hidden_layers": hf.num_hidden_layers}),
        "expert": (expert, {"num_experts": sizes.get("experts", 1)}),
    }
    errors = [
        f"target_{kind}_parallel_size={size}; does not divide {what}={number}"
        for kind, (size, numbers) in rules.items()
        for what, number in numbers.items()
        if size < 1 or number % size
    ]
    if errors:
        raise ValueError("; ".join(errors))
