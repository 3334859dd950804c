"""Weights into a model on a CPU without tensor parallelism, from memory that the trainer shares.

vLLM's CPU build keeps each linear weight as a private packed copy (a oneDNN kernel). New kernels are packed from the
trainer's memory while the checksum is computed from the same cached bytes, and put in place only once it is right: both
sets exist for a moment.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from megarlhf.formats.shared_memory import SharedTensors
from megarlhf.formats.threads import map_threads
from megarlhf.rollout import reload


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One linear layer, whose kernel is packed from the tensors that it fuses."""

    module: LinearBase
    names: list[str]
    loaded: Tensor  # the layer's weight as it was before packing, without numbers
    joined: Tensor | None  # view over the tensors; None where their numbers have to be put together

    def packed_kernel(self, tensors: SharedTensors) -> Any:
        """What vLLM calls as `module.cpu_linear`, made of the tensors as they are now; the module is left alone."""
        weight = self.joined
        if weight is None:
            weight = torch.empty(self.loaded.shape, dtype=self.loaded.dtype)
            read_rows(tensors, self.names, weight)
        staging: Any = SimpleNamespace(weight=weight.detach())  # a name of its own for what may be replaced
        self.module.quant_method.process_weights_after_loading(staging)
        return staging.cpu_linear


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A parameter, or its rows without padding, into which the tensors that it fuses are copied."""

    destination: Tensor
    names: list[str]


# What reaches a model in this order, and the blocks that each step reads and none before it does; valid as long as the
# model and the memory exist.
DirectPlan = list[tuple[Copy | Pack, list[int]]]


def read_rows(tensors: SharedTensors, names: Sequence[str], out: Tensor) -> None:
    """Fill a tensor with those that it fuses, joined along dimension 0."""
    for name, rows in zip(names, out.split([tensors.shape(name)[0] for name in names]), strict=True):
        tensors.read(name, rows)


def _fused_names(model: nn.Module, module_name: str, parameter_name: str) -> list[str]:
    """Hugging Face names of the tensors that vLLM fuses into this parameter, in order; one name if it fuses none."""
    prefix, _, leaf = module_name.rpartition(".")
    parts = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    return [".".join(filter(None, (prefix, part, parameter_name))) for part in parts]


def _plan_pack(module: nn.Module, parameter: Tensor, names: list[str], tensors: SharedTensors) -> Pack | None:
    """None unless the layer keeps nothing but a packed copy, of exactly these tensors."""
    if type(module.quant_method) is not UnquantizedLinearMethod or parameter.numel() != 0:
        return None
    loaded = get_layerwise_info(module).restore_metadata[0]["weight"]
    shapes = [tensors.shape(name) for name in names]
    if (sum(shape[0] for shape in shapes), *shapes[0][1:]) != tuple(loaded.shape):
        return None
    joined = tensors.joined(names) if {tensors.dtype(name) for name in names} == {loaded.dtype} else None
    return Pack(module=module, names=names, loaded=loaded, joined=joined)


def _plan_copy(module: nn.Module, parameter: Tensor, names: list[str], tensors: SharedTensors) -> Copy | None:
    """None where vLLM's loader would do more than copy."""
    loader = getattr(parameter, "weight_loader", default_weight_loader)
    if loader is not default_weight_loader and not isinstance(module, LinearBase | VocabParallelEmbedding):
        return None
    shapes = [tensors.shape(name) for name in names]
    num_rows = sum(shape[0] for shape in shapes)
    spare = parameter.shape[0] - num_rows
    padded = isinstance(module, VocabParallelEmbedding)  # rows past the vocabulary are zero and stay so
    if spare < 0 or (spare and not padded) or any(shape[1:] != parameter.shape[1:] for shape in shapes):
        return None
    return Copy(destination=parameter.data[:num_rows], names=names)


def plan_direct_update(model: nn.Module, tensors: SharedTensors) -> DirectPlan | None:
    """A plan that covers every parameter and every tensor exactly, or None where only vLLM's loader can do it."""
    steps, unused = list[Copy | Pack](), set(tensors.names)
    embeddings = [m for m in model.modules() if type(m) is VocabParallelEmbedding]
    for module_name, module in model.named_modules():
        if isinstance(module, ParallelLMHead) and any(module.weight is other.weight for other in embeddings):
            continue  # tied
        for parameter_name, parameter in module.named_parameters(recurse=False):
            names = _fused_names(model, module_name, parameter_name)
            if not unused.issuperset(names):
                return None
            unused.difference_update(names)
            is_packed = isinstance(module, LinearBase) and parameter_name == "weight"
            step = (_plan_pack if is_packed else _plan_copy)(module, parameter, names, tensors)
            if step is None:
                return None
            steps.append(step)
    if unused:
        return None
    left, plan = set(range(len(tensors.blocks))), DirectPlan()
    steps.sort(key=lambda step: isinstance(step, Pack))  # the largest is among the copies: the embedding
    for step in steps:
        mine = left.intersection(tensors.blocks_of(step.names))
        left -= mine
        plan.append((step, sorted(mine)))
    return plan


def update_directly(
    model: nn.Module, tensors: SharedTensors, plan: DirectPlan, *, begin: Callable[[Sequence[bytes]], None]
) -> None:
    """Pack new kernels while the digests are computed, then put them in place.

    Args:
        begin: is given the digests of all blocks before anything of the model changes; where it raises, nothing does.
    """
    digests: dict[int, bytes] = {}

    def digest_and_pack(work: tuple[Copy | Pack, list[int]]) -> Any:
        step, blocks = work
        # The digest brings a layer's bytes into the cache, from which they are packed.
        digests.update({number: tensors.digest(number) for number in blocks})
        return step.packed_kernel(tensors) if isinstance(step, Pack) else None

    kernels = map_threads(digest_and_pack, plan, torch.get_num_threads())
    begin([digests[number] for number in range(len(tensors.blocks))])
    for (step, _), kernel in zip(plan, kernels, strict=True):
        if isinstance(step, Pack):
            step.module.cpu_linear = kernel
        else:
            read_rows(tensors, step.names, step.destination)
    reload.repack_output_heads(model)
