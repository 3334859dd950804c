"""vLLM weight-transfer backend that reads a policy's weights where the trainer's ranks hold them in shared memory.

The ranks say once what lies where (formats/shared_memory.py). For each update every engine on the host is told the
version and the checksum, and reads while the ranks wait. Two ways lead into a model, with equal results:

- direct, on a CPU without tensor parallelism: vLLM's CPU build keeps each linear weight as a private packed copy (a
  oneDNN kernel). New kernels are packed from the trainer's memory while the checksum is computed from the same cached
  bytes, and put in place only once it is right: both sets exist for a moment.
- loader, everywhere else: vLLM's own layerwise reload, which shards, converts and processes by itself. It keeps the
  tensors of a layer until the last has come, so they come layer by layer, whichever rank holds them: it never keeps
  more than the experts of one layer. Rows that pad a vocabulary never come; without `expect_no_padding` the embedding
  and the head would be kept to the end.

vLLM 0.32's reload leaves two things wrong on a CPU. The kernel of a tied output head is packed when the model is first
loaded and never again: `repack_output_heads` does it after every update. Experts' weights are packed at the first load
and merely copied at a reload, unpacked, over the packed ones: `forget_expert_kernels` makes each load a first one.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from megarlhf.algos.fp8 import BLOCK, largest, rounded, rounded_blocks, scale_of
from megarlhf.formats.shared_memory import Block, SharedTensors, checksum
from megarlhf.formats.threads import map_threads

BACKEND = "megarlhf_shared_memory"
ROUNDS = "megarlhf_rounds_weights"  # key of vLLM's additional_config: fp8_per_tensor or fp8_per_block
_FP8 = torch.float8_e4m3fn
NO_VERSION = -1  # of an engine whose update failed halfway, or whose weights are dropped


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Where the trainer's ranks hold the weights."""

    blocks: list[Block]


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One version of the weights."""

    version: int  # policy version, reported back
    checksum: str  # over the blocks' digests, by the trainer


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


def register() -> None:
    """Make the backend known to this process; also the `vllm.general_plugins` entry point, so it may run twice."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)


def repack_output_heads(model: nn.Module) -> None:
    """Rebuild the CPU kernel of each output head from its current weight, which it may share with the embedding.

    A model without a head of its own (Gemma 2) computes logits with its embedding.
    """
    if current_platform.is_cpu():
        embeddings = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
        for module in [m for m in embeddings if isinstance(m, ParallelLMHead)] or embeddings:
            vars(module).pop("cpu_linear", None)  # frees the old kernel first: the new one can have its memory
            module.quant_method.process_weights_after_loading(module)


def forget_expert_kernels(model: nn.Module) -> None:
    """Let the next load of each layer's experts pack their weights for the CPU again."""
    if current_platform.is_cpu():
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None


def round_linear_weights(model: nn.Module, quantization: str) -> None:
    """From the next load on let linear layers and experts of a CPU compute with what FP8 holds of their weights.

    As vLLM's online quantization on GPUs: a scale for each layer, of q, k, v and of gate, up together, or for each
    block of 128x128, and for each expert. Output heads and routers stay as they are, as do activations, other than
    there.
    """

    def rounded_part(layer: Any, weight: Tensor) -> Tensor:
        if quantization == "fp8_per_block":
            return rounded_blocks(weight, _FP8, rows=BLOCK, columns=BLOCK, power_of_two=False).to(weight.dtype)
        amax = largest(weight).reshape(1)
        if getattr(layer, "tp_size", 1) > 1 and isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=get_tp_group().device_group)
        return rounded(weight, scale_of(amax, _FP8), _FP8).to(weight.dtype)

    def round_before(method: Any, names: Sequence[str]) -> None:
        process = method.process_weights_after_loading

        def process_rounded(layer: Any) -> None:
            for name in names:
                weight = getattr(layer, name)
                parts = [weight.data] if weight.dim() == 2 else list(weight.data)  # of each expert its own
                whole = torch.stack([rounded_part(layer, part) for part in parts])
                weight.data = whole[0] if weight.dim() == 2 else whole
            process(layer)

        method.process_weights_after_loading = process_rounded

    for name, module in model.named_modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(module, LinearBase) and not name.endswith("gate"):  # a router
            round_before(method, ("weight",))
        elif isinstance(method, UnquantizedFusedMoEMethod):
            round_before(method, ("w13_weight", "w2_weight"))


def expect_no_padding(model: nn.Module) -> None:
    """Let a reload that has begun count an embedding or head as complete without the rows that pad its vocabulary."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            weight: Any = module.weight
            weight.weight_loader_numel = module.shard_indices.num_org_elements * weight.shape[1]


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


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Takes all weights at each update; `version` and `checksum` tell what it holds, `applied` how that came in."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.version, self.checksum = 0, ""
        self.applied: Literal["", "direct", "loader"] = ""
        if isinstance(vllm_config.additional_config, dict) and (rounds := vllm_config.additional_config.get(ROUNDS)):
            round_linear_weights(model, rounds)
        self._tensors: SharedTensors | None = None
        self._plan: DirectPlan | None = None
        self._direct_allowed = (
            current_platform.is_cpu()
            and not current_platform.is_zen_cpu()  # its kernels may keep the view instead of a copy
            and vllm_config.parallel_config.tensor_parallel_size == 1
        )

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Map the trainer's memory, once: mapping anew would fault in every page again."""
        tensors = SharedTensors(init_info.blocks)
        self._plan = plan_direct_update(self.model, tensors) if self._direct_allowed else None
        self._tensors = tensors

    def start_weight_update(self) -> None:
        """Nothing to prepare: each update is complete in itself."""

    def finish_weight_update(self) -> None:
        """Nothing is pending after an update."""

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Replace the model's weights by the trainer's.

        Raises:
            ValueError: the memory does not match the checksum; the model keeps its weights.
            RuntimeError: weights of the model are not among them, and it is left with a mixture; or the engine was
                never told where the weights are.
        """
        if self._tensors is None:
            raise RuntimeError("weights cannot be updated before init_weight_transfer_engine has said where they are")
        if self._plan is not None:
            self._apply_directly(self._tensors, self._plan, update_info)
        else:
            self._apply_with_loader(self._tensors, update_info)
        self.version, self.checksum = update_info.version, update_info.checksum
        self.applied = "loader" if self._plan is None else "direct"

    def shutdown(self) -> None:
        """Unmap the memory."""
        self._plan = self._tensors = None

    def _verify(self, digests: Sequence[bytes], update_info: SharedMemoryUpdate) -> None:
        found = checksum(digests)
        if found != update_info.checksum:
            raise ValueError(
                f"checksum={update_info.checksum} of weight version {update_info.version} does not match {found}, "
                "computed from the shared memory: the weights changed since the trainer's checksum"
            )

    def _apply_with_loader(self, tensors: SharedTensors, update_info: SharedMemoryUpdate) -> None:
        """vLLM's layerwise reload."""
        digests = map_threads(tensors.digest, range(len(tensors.blocks)), torch.get_num_threads())
        self._verify(digests, update_info)
        self.version = NO_VERSION
        expected = {name for name, _ in self.model.named_parameters()}
        load_weights: Any = self.model.load_weights
        forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)
        expect_no_padding(self.model)
        try:
            loaded = load_weights((name, tensors.read(name)) for name in tensors.names)
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        if missing := sorted(expected - loaded):
            raise RuntimeError(f"the shared memory lacks weights of the model: {', '.join(missing[:8])}")
        repack_output_heads(self.model)

    def _apply_directly(self, tensors: SharedTensors, plan: DirectPlan, update_info: SharedMemoryUpdate) -> None:
        """Pack new kernels while the checksum is computed, then put them in place."""
        digests: dict[int, bytes] = {}

        def digest_and_pack(work: tuple[Copy | Pack, list[int]]) -> Any:
            step, blocks = work
            # The digest brings a layer's bytes into the cache, from which they are packed.
            digests.update({number: tensors.digest(number) for number in blocks})
            return step.packed_kernel(tensors) if isinstance(step, Pack) else None

        kernels = map_threads(digest_and_pack, plan, torch.get_num_threads())
        self._verify([digests[number] for number in range(len(tensors.blocks))], update_info)
        self.version = NO_VERSION
        for (step, _), kernel in zip(plan, kernels, strict=True):
            if isinstance(step, Pack):
                step.module.cpu_linear = kernel
            else:
                read_rows(tensors, step.names, step.destination)
        repack_output_heads(self.model)


class WorkerExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`), for collective_rpc by name."""

    weight_transfer_engine: SharedMemoryEngine

    def weight_status(self) -> dict[str, Any]:
        """Version (or NO_VERSION) and checksum of this worker's weights and how they came."""
        engine = self.weight_transfer_engine
        return {"version": engine.version, "checksum": engine.checksum, "applied": engine.applied}

    def drop_weights(self) -> int:
        """The weights will be lost in a sleep: their version from now on."""
        self.weight_transfer_engine.version = NO_VERSION
        return NO_VERSION

    def ignore_interrupts(self) -> None:
        """Ctrl-C, which a terminal sends to every process of the program, is for the first of them."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)


register()  # a worker process imports this module for WorkerExtension, before it looks for the backend
