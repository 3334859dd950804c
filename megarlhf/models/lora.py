"""Low-rank adapters beside a model's frozen matrices (LoRA, arXiv:2106.09685), in any layout.

Hugging Face's modules have one adapter each, also where Megatron-Core fuses their weights: y += alpha / r * B A x, with
A [r, in] drawn as PEFT draws it and B [out, r] zero at first. A linear layer cut by its outputs (column parallel) has A
whole and B cut; one cut by its inputs (row parallel) A cut and B whole. What crosses ranks is A x, r numbers a token.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Module, ModuleDict, Parameter

from megarlhf.config.lora import LoraArguments
from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import Split, WeightMap
from megarlhf.models.four_bit import quantise
from megarlhf.models.heads import with_new_strides
from megarlhf.models.shards import fused_outputs
from megarlhf.models.targets import adaptable, check_targets, is_quantised, last_name, module_of
from megarlhf.models.weights import LocalWeight, ModelWeights
from megarlhf.parallel.groups import Ranks, separate_generators

_PEFT = "base_model.model."  # what PEFT puts before the names of Hugging Face


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where an adapter stands: how its linear layer is cut, and what its ranks do."""

    cut: Literal["outputs", "inputs", "no"]
    sequence_parallel: bool
    expert: bool  # the dispatcher gathers tokens over expert-tensor ranks, and sums what these give
    group: Any  # tensor-parallel, or expert-tensor-parallel

    @property
    def _alone(self) -> bool:
        return self.group.size() == 1

    def weights(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B; the gradient of an expert's whole one is summed over its ranks, each of which has a part of it."""
        if not self.expert or self._alone:
            return a, b
        if self.cut == "outputs":
            return copy_to_tensor_model_parallel_region(a, group=self.group), b
        return a, copy_to_tensor_model_parallel_region(b, group=self.group)

    def between(self, narrow: Tensor) -> Tensor:
        """A x of this rank's numbers, as B takes it: of all tokens where B is cut, summed where A is."""
        if self.expert or self._alone or self.cut == "no":
            return narrow
        if self.cut == "outputs":
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(narrow, group=self.group)
            return copy_to_tensor_model_parallel_region(narrow, group=self.group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
        return reduce_from_tensor_model_parallel_region(narrow, group=self.group)

    def dropout(self, hidden: Tensor, probability: float) -> Tensor:
        """Dropout that is alike on ranks with the same numbers, and another on ranks with others.

        But for experts: each rank that holds a part of one has a mask of its own.
        """
        if self._alone or (self.cut != "inputs" and not self.sequence_parallel):
            return F.dropout(hidden, probability)
        with separate_generators():
            return F.dropout(hidden, probability)


class Adapter(Module):
    """One Hugging Face module's A and B, as this rank holds them."""

    def __init__(
        self, a: Tensor, outputs: int, site: Site, *, module: str, options: LoraArguments, allreduce: bool
    ) -> None:
        super().__init__()
        self.module, self.site = module, site
        self.scaling, self.probability = options.lora_alpha / options.lora_rank, options.lora_dropout
        self.lora_a, self.lora_b = Parameter(a), Parameter(a.new_zeros(outputs, len(a)))
        first_rank = site.group.rank() == 0
        for parameter, part in ((self.lora_a, "inputs"), (self.lora_b, "outputs")):
            # for the gradient's norm: whose numbers count. An expert's are on no other tensor-parallel rank.
            own = site.cut == part or (site.expert and first_rank)
            set_tensor_model_parallel_attributes(parameter, own, int(part == "inputs"), 1)
            summed = site.sequence_parallel and not site.expert and site.cut != part
            setattr(parameter, "sequence_parallel", summed)  # noqa: B010  (no such attribute, to mypy)
            setattr(parameter, "allreduce", allreduce)  # noqa: B010
            # where tensor parallelism does not reach an expert's ranks, Megatron-Core's norm takes one for the first
            setattr(parameter, "shared", site.expert and not own)  # noqa: B010

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in of this rank] -> [..., out of this rank], what is added to the linear layer's."""
        a, b = self.site.weights(self.lora_a, self.lora_b)
        if self.training and self.probability:
            hidden = self.site.dropout(hidden, self.probability)
        return F.linear(self.site.between(F.linear(hidden, a)) * self.scaling, b)

    @torch.no_grad()
    def product(self) -> Tensor:
        """[out, in] of this rank: what merging adds to the weight."""
        return (self.lora_b.float() @ self.lora_a.float()) * self.scaling


class FusedAdapters(Module):
    """The adapters of the Hugging Face modules that one linear layer of Megatron-Core holds."""

    def __init__(self, adapters: dict[str, Adapter], weight: WeightMap, hf: HFConfig, switch: "Switch") -> None:
        super().__init__()
        self.by_module = ModuleDict({last_name(module): adapter for module, adapter in adapters.items()})
        self._weight, self._hf, self._switch = weight, hf, switch

    def add_to(self, linear: Any, inputs: tuple[Tensor, ...], outputs: Any) -> Any:
        """Forward hook of the linear layer, whose outputs are a tensor and a bias to add later."""
        if not self._switch.on:
            return None
        (hidden, *_), (output, bias) = inputs, outputs
        if (norm := getattr(linear, "layer_norm_weight", None)) is not None:  # TransformerEngine's, fused with a norm
            factor = norm + 1.0 if linear.config.layernorm_zero_centered_gamma else norm
            hidden = F.rms_norm(hidden, norm.shape, factor, linear.config.layernorm_epsilon)
        parts = [self._part(name, hidden) for name in self._weight.hf]
        return output + fused_outputs(self._weight, parts, output.shape[-1], self._hf), bias

    def _part(self, hf_name: str, hidden: Tensor) -> Tensor | None:
        name = last_name(module_of(hf_name))
        return self.by_module[name](hidden) if name in self.by_module else None


@dataclass
class Switch:
    """Whether adapters take part."""

    on: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainedTensor:
    """One tensor of an adapter checkpoint, as this rank holds it."""

    name: str  # in PEFT's file
    parameter: Parameter
    shape: tuple[int, ...]  # of the whole
    axis: int | None  # cut along it; None: whole
    expert: bool

    def part(self, ranks: Ranks) -> tuple[int, int]:
        """This rank's part, and of how many."""
        if self.axis is None:
            return 0, 1
        return (ranks.etp_rank, ranks.etp_size) if self.expert else (ranks.tp_rank, ranks.tp_size)

    def index(self, ranks: Ranks) -> tuple[slice, ...]:
        """This rank's part of the whole."""
        number, _ = self.part(ranks)
        sizes = self.parameter.shape
        return tuple(
            slice(number * size, (number + 1) * size) if axis == self.axis else slice(None)
            for axis, size in enumerate(sizes)
        )

    def replica(self, ranks: Ranks) -> tuple[int, int, int]:
        """Megatron-Core's number of this copy; zeros on the one that writes."""
        rank = ranks.etp_rank if self.expert else ranks.tp_rank
        return 0, rank if self.axis is None else 0, ranks.expert_replica_rank if self.expert else ranks.replica_rank


class Adapters:
    """All adapters of a model's chunks; the weights beside them are frozen, but for a value head.

    Args:
        weights: of the same chunks; loaded, where they are to be quantised.
        seed: of the A matrices, which are the same in every layout.
    Raises:
        ValueError: a target module that the model has not.
    """

    def __init__(self, chunks: Sequence[Any], weights: ModelWeights, options: LoraArguments, *, seed: int) -> None:
        self.options, self._weights, self._switch = options, weights, Switch()
        self._by_weight: dict[str, dict[str, Adapter]] = {}
        config = chunks[0].config
        for chunk in chunks:
            chunk.requires_grad_(False)
            if chunk.pre_process:
                chunk.embedding.register_forward_hook(lambda _, inputs, output: with_new_strides(output))
            if chunk.pre_process and config.recompute_granularity == "full":
                # a recomputed layer has gradients only where its input asks for them
                chunk.embedding.register_forward_hook(
                    lambda _, inputs, output: output.requires_grad_(torch.is_grad_enabled())
                )
        targets = check_targets(options.target_modules, weights.maps)
        layers = {
            id(m.weight): m for c in chunks for m in c.modules() if isinstance(getattr(m, "weight", None), Tensor)
        }
        for local in weights.local:
            if local.weight.hf == ("score.weight",):
                local.param.requires_grad_(True)
            if found := self._adapters(local, targets, config, seed):
                linear = layers.get(id(local.param))
                assert linear is not None, f"{local.name} is of grouped experts, which check_model_targets refuses"
                linear.lora = FusedAdapters(found, local.weight, weights.hf, self._switch)
                linear.register_forward_hook(linear.lora.add_to)
                self._by_weight[local.name] = found
            if options.load_in_4bit and is_quantised(local.weight):
                quantise(layers[id(local.param)])

    def _adapters(self, local: LocalWeight, targets: set[str], config: Any, seed: int) -> dict[str, Adapter]:
        weight, ranks, param = local.weight, self._weights.ranks, local.param
        modules = [m for m in adaptable(weight) if last_name(m) in targets] if local.exported else []
        if not modules:
            return {}
        site = Site(
            cut={Split.ROW: "inputs", Split.REPLICATED: "no"}.get(weight.split, "outputs"),  # type: ignore[arg-type]
            sequence_parallel=config.sequence_parallel and ranks.tp_size > 1,
            expert=weight.expert,
            group=(
                parallel_state.get_expert_tensor_parallel_group()
                if weight.expert
                else parallel_state.get_tensor_model_parallel_group()
            ),
        )
        own = {module_of(shard.hf_name): shard for shard in self._weights.shards(local, param.data)}
        found = {}
        for module in modules:
            shape, index = self._weights.hf_shapes[f"{module}.weight"], own[module].index
            outputs = len(range(shape[0])[index[0]])
            a = drawn_a(module, self.options.lora_rank, shape[1], seed)[:, index[1]].to(param).clone()
            allreduce = getattr(param, "allreduce", True)
            found[module] = Adapter(a, outputs, site, module=module, options=self.options, allreduce=allreduce)
        return found

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block the model is the frozen one, which is the reference that training started from."""
        self._switch.on = False
        try:
            yield
        finally:
            self._switch.on = True

    @torch.no_grad()
    def merged(self, local: LocalWeight) -> Tensor:
        """The weight with its adapters' products added, rounded once; the parameter's data where it has none."""
        data = local.data
        adapters = self._by_weight.get(local.name)
        if adapters is None:
            return data
        whole = data.to(torch.promote_types(data.dtype, torch.float32), copy=True)
        for shard in self._weights.shards(local, whole):
            if (adapter := adapters.get(module_of(shard.hf_name))) is not None:
                shard.view.add_(adapter.product().view(shard.view.shape))
        return whole.to(data.dtype)

    def tensors(self) -> list[TrainedTensor]:
        """What is trained, under PEFT's names."""
        found = []
        for local in self._weights.local:
            if local.weight.hf == ("score.weight",):
                shape = self._weights.hf_shapes["score.weight"]
                found.append(_tensor("score.weight", local.param, shape, axis=None, expert=False))
            for module, adapter in self._by_weight.get(local.name, {}).items():
                (outputs, inputs), site, rank = (
                    self._weights.hf_shapes[f"{module}.weight"],
                    adapter.site,
                    len(adapter.lora_a),
                )
                for name, parameter, shape, cut, axis in (
                    ("lora_A", adapter.lora_a, (rank, inputs), "inputs", 1),
                    ("lora_B", adapter.lora_b, (outputs, rank), "outputs", 0),
                ):
                    split = axis if site.cut == cut else None
                    found.append(_tensor(f"{module}.{name}.weight", parameter, shape, axis=split, expert=site.expert))
        return found

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """For Megatron-Core's distributed checkpoints: what is trained alone, loadable in any layout."""
        ranks = self._weights.ranks
        return {
            tensor.name: ShardedTensor.from_rank_offsets(
                tensor.name,
                tensor.parameter,
                *([] if tensor.axis is None else [(tensor.axis, *tensor.part(ranks))]),
                replica_id=tensor.replica(ranks),
            )
            for tensor in self.tensors()
        }

    def target_names(self) -> list[str]:
        """Last names of all modules of the whole model that have adapters."""
        return sorted(check_targets(self.options.target_modules, self._weights.maps))


def _tensor(
    name: str, parameter: Parameter, shape: tuple[int, ...], *, axis: int | None, expert: bool
) -> TrainedTensor:
    return TrainedTensor(name=_PEFT + name, parameter=parameter, shape=shape, axis=axis, expert=expert)


def drawn_a(module: str, rank: int, inputs: int, seed: int) -> Tensor:
    """[rank, inputs] float32 of a module, uniform up to 1 / sqrt(inputs): PEFT's kaiming_uniform_(a=sqrt(5))."""
    generator = torch.Generator().manual_seed(zlib.crc32(module.encode()) + (seed << 32) % 2**63)
    bound = 1.0 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
