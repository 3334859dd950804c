"""vLLM weight-transfer backend that takes a policy's weights from one safetensors file in shared memory.

The trainer writes the file in place (data/tensor_file.py), then every inference engine on the host is told its path,
version and checksum. Two ways lead from the file into a model, with equal results:

- direct, on a CPU without tensor parallelism: vLLM's CPU build keeps each linear weight as a private packed copy (a
  oneDNN kernel). The new kernels are packed straight from views of the file while the checksum is computed from the
  same cached bytes, and are put in place only once the checksum is right. It holds both sets for a moment.
- loader, everywhere else: vLLM's own layerwise reload, which shards, converts and processes by itself.

vLLM 0.32's reload leaves two things wrong on a CPU. The kernel of a tied output head is packed when the model is first
loaded and never again: `repack_output_heads` does it after every update. Experts' weights are packed at the first load
and merely copied at a reload, unpacked, over the packed ones: `forget_expert_kernels` makes each load a first one.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from megarlhf.data.tensor_file import TensorFile, run_side_by_side

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig

BACKEND = "megarlhf_shared_file"
MIXED_WEIGHTS = -1  # version of an engine whose update failed halfway


@dataclass
class SharedFileInit(WeightTransferInitInfo):
    """Nothing needs to be agreed on beforehand."""


@dataclass
class SharedFileUpdate(WeightTransferUpdateInfo):
    """Where one version of the weights lies."""

    path: str  # safetensors file with Hugging Face names
    version: int  # policy version, reported back
    checksum: str  # TensorFile.checksum() after the last write


@dataclass(frozen=True)
class Pack:
    """One linear layer, whose kernel is packed from a view over the tensors that it fuses."""

    module: LinearBase
    names: list[str]
    view: Tensor

    def packed_kernel(self) -> Any:
        """What vLLM calls as `module.cpu_linear`, made of the view as it is now; the module is left alone."""
        staging: Any = SimpleNamespace(weight=self.view)
        self.module.quant_method.process_weights_after_loading(staging)
        return staging.cpu_linear


@dataclass(frozen=True)
class Copy:
    """One tensor of the file, which is copied into (a part of) a parameter."""

    destination: Tensor
    names: list[str]  # of the one tensor
    view: Tensor


@dataclass(frozen=True)
class DirectPlan:
    """How every tensor of one file reaches every parameter of one model; valid as long as both exist."""

    packs: list[Pack]
    copies: list[Copy]


def register() -> None:
    """Make the backend known to this process; also the `vllm.general_plugins` entry point, so it may run twice."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SharedFileEngine)


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


def _file_names(model: nn.Module, module_name: str, parameter_name: str) -> list[str]:
    """Hugging Face names of the tensors that vLLM fuses into this parameter, in order; one name if it fuses none."""
    prefix, _, leaf = module_name.rpartition(".")
    parts = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    return [".".join(filter(None, (prefix, part, parameter_name))) for part in parts]


def _is_tied(module: nn.Module, embeddings: Sequence[nn.Module]) -> bool:
    return isinstance(module, ParallelLMHead) and any(module.weight is other.weight for other in embeddings)


def _plan_pack(module: nn.Module, parameter: Tensor, names: list[str], file: TensorFile) -> Pack | None:
    """None unless the layer keeps nothing but a packed copy, of exactly the tensor that lies in the file."""
    if type(module.quant_method) is not UnquantizedLinearMethod or parameter.numel() != 0:
        return None
    view = file.fused_view(names)
    loaded = get_layerwise_info(module).restore_metadata[0]["weight"]  # the parameter as it was before packing
    if view is None or view.shape != loaded.shape or view.dtype != loaded.dtype:
        return None
    return Pack(module, names, view)


def _plan_copies(module: nn.Module, parameter: Tensor, names: list[str], file: TensorFile) -> list[Copy] | None:
    """The tensors' places along dimension 0 of the parameter; None where vLLM's loader would do more than copy."""
    loader = getattr(parameter, "weight_loader", default_weight_loader)
    if loader is not default_weight_loader and not isinstance(module, LinearBase | VocabParallelEmbedding):
        return None
    copies, row = [], 0
    for name in names:
        view = file.view(name)
        destination = parameter.data[row : row + view.shape[0]]
        if destination.shape != view.shape:
            return None
        copies.append(Copy(destination, [name], view))
        row += view.shape[0]
    padded = isinstance(module, VocabParallelEmbedding)  # rows past the vocabulary are zero and stay so
    return copies if padded or row == parameter.shape[0] else None


def plan_direct_update(model: nn.Module, file: TensorFile) -> DirectPlan | None:
    """A plan that covers every parameter and every tensor exactly, or None where only vLLM's loader can do it.

    Fused layers (q, k, v and gate, up) need their parts next to each other in the file.
    """
    packs: list[Pack] = []
    copies: list[Copy] = []
    unused = set(file.names)
    embeddings = [m for m in model.modules() if type(m) is VocabParallelEmbedding]
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if _is_tied(module, embeddings):
                continue
            names = _file_names(model, module_name, parameter_name)
            if not unused.issuperset(names):
                return None
            unused.difference_update(names)
            if isinstance(module, LinearBase) and parameter_name == "weight":
                pack = _plan_pack(module, parameter, names, file)
                if pack is None:
                    return None
                packs.append(pack)
            else:
                placed = _plan_copies(module, parameter, names, file)
                if placed is None:
                    return None
                copies += placed
    return None if unused else DirectPlan(packs, copies)


class SharedFileEngine(WeightTransferEngine[SharedFileInit, SharedFileUpdate]):
    """Applies a whole file per update; `version` and `checksum` tell what the model holds, `applied` how it came in."""

    init_info_cls = SharedFileInit
    update_info_cls = SharedFileUpdate
    supports_draft_weight_update = False

    def __init__(
        self, config: "WeightTransferConfig", vllm_config: "VllmConfig", device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.version = 0
        self.checksum = ""
        self.applied: Literal["", "direct", "loader"] = ""
        self._opened: tuple[str, int, int] | None = None
        self._file: TensorFile | None = None
        self._plan: DirectPlan | None = None
        self._direct_allowed = (
            current_platform.is_cpu()
            and not current_platform.is_zen_cpu()  # its kernels may keep the view instead of a copy
            and vllm_config.parallel_config.tensor_parallel_size == 1
        )

    def init_transfer_engine(self, init_info: SharedFileInit) -> None:
        """Nothing to set up: the first update opens the file."""

    def start_weight_update(self) -> None:
        """Nothing to prepare: each update is complete in itself."""

    def finish_weight_update(self) -> None:
        """Nothing is pending after an update."""

    def receive_weights(self, update_info: SharedFileUpdate) -> None:
        """Replace the model's weights by those of the file.

        Raises:
            ValueError: the file's bytes do not match the checksum; the model keeps its weights.
            RuntimeError: the file lacks weights of the model, which is left with a mixture.
        """
        file = self._open(update_info.path)
        if self._plan is not None:
            self._apply_directly(file, self._plan, update_info)
        else:
            self._apply_with_loader(file, update_info)
        self.version, self.checksum = update_info.version, update_info.checksum
        self.applied = "loader" if self._plan is None else "direct"

    def shutdown(self) -> None:
        """Unmap the file."""
        self._plan = self._file = self._opened = None

    def _open(self, path: str) -> TensorFile:
        """The mapped file; mapped once, since mapping anew would fault in every page again."""
        status = os.stat(path)
        identity = (path, status.st_dev, status.st_ino)  # a new file may have an old one's path
        if self._file is None or self._opened != identity:
            self._file, self._opened = TensorFile.open(path), identity
            self._plan = plan_direct_update(self.model, self._file) if self._direct_allowed else None
        return self._file

    def _verify(self, found: str, update_info: SharedFileUpdate) -> None:
        if found != update_info.checksum:
            raise ValueError(
                f"checksum={update_info.checksum} of weight version {update_info.version} does not match {found}, "
                f"computed from {update_info.path}: the file was incomplete, or changed since the trainer's checksum"
            )

    def _apply_with_loader(self, file: TensorFile, update_info: SharedFileUpdate) -> None:
        """vLLM's layerwise reload."""
        self._verify(file.checksum(), update_info)
        self.version = MIXED_WEIGHTS
        expected = {name for name, _ in self.model.named_parameters()}
        load_weights: Any = self.model.load_weights
        forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)
        try:
            loaded = load_weights((name, file.view(name)) for name in file.names)
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        if missing := sorted(expected - loaded):
            raise RuntimeError(f"{update_info.path} lacks weights of the model: {', '.join(missing[:8])}")
        repack_output_heads(self.model)

    def _apply_directly(self, file: TensorFile, plan: DirectPlan, update_info: SharedFileUpdate) -> None:
        """Pack new kernels while the checksum is computed, then put them in place."""
        digests: dict[str, bytes] = {}

        def digest_and_pack(step: Copy | Pack) -> Any:
            # The digest brings a layer's bytes into the cache, from which they are packed.
            digests.update({name: file.digest(name) for name in step.names})
            return step.packed_kernel() if isinstance(step, Pack) else None

        steps: list[Copy | Pack] = [*plan.copies, *plan.packs]
        kernels = run_side_by_side(digest_and_pack, steps, torch.get_num_threads())
        self._verify(file.checksum(digests), update_info)
        self.version = MIXED_WEIGHTS
        for pack, kernel in zip(plan.packs, kernels[len(plan.copies) :], strict=True):
            pack.module.cpu_linear = kernel
        del kernels
        for copy in plan.copies:
            copy.destination.copy_(copy.view)
        repack_output_heads(self.model)


class WeightStatus:
    """Mixed into vLLM's worker class (`worker_extension_cls`), for collective_rpc by name."""

    weight_transfer_engine: SharedFileEngine

    def weight_status(self) -> dict[str, Any]:
        """Version and checksum of this worker's weights and how they came; version -1: an update failed halfway."""
        engine = self.weight_transfer_engine
        return {"version": engine.version, "checksum": engine.checksum, "applied": engine.applied}


register()  # a worker process imports this module for WeightStatus, before it looks for the backend
