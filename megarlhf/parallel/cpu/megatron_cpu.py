"""Lets the unmodified Megatron-Core wheel run on a machine without CUDA, over gloo.

Megatron-Core names CUDA in its source: `torch.cuda.current_device()`, `device="cuda"`, pinned memory. `install()` puts
an import hook in front of `megatron.core` that rewrites those names while the modules are imported, and mends the few
places where the CPU needs other behaviour. torch, transformers and vLLM stay as they are. Where CUDA is present the
hook is never installed. Every rule must match something, so that an upgrade of Megatron-Core cannot pass by in silence.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import re
import sys
import types
import warnings
from collections import Counter
from typing import Any

import torch

from megarlhf.parallel.device import device_kind
from megarlhf.parallel.megatron_versions import bind_router_product

_RULES = {
    "type names": (re.compile(r"(['\"])torch\.cuda\.(Float|Half|BFloat16)Tensor\1"), r"\1torch.\2Tensor\1"),
    "torch.cuda": (re.compile(r"(?<!import )(?<!from )\btorch\.cuda\."), "_cpu."),
    "device": (re.compile(r"(device\s*=\s*|torch\.device\()(['\"])cuda\2"), r"\1\2cpu\2"),
    "pinned memory": (re.compile(r"pin_memory=True"), "pin_memory=False"),
    ".cuda()": (re.compile(r"\.cuda\((non_blocking=True)?\)"), ".cpu()"),
    # Split sizes of all-to-all become numpy arrays where they leave a GPU.
    "split sizes": (re.compile(r"is_tensor\(tensor\) and tensor\.is_cuda"), "is_tensor(tensor)"),
}
_MODULE_RULES = {  # of one module alone
    "megatron.core.optimizer.cpu_offloading.hybrid_optimizer": {
        # It tells the device's tensors from the host's by is_cuda; here all that it is given is the device's.
        "given tensors": (re.compile(r"(?<=\S) (and|if) param\.is_cuda"), ""),
        "host copies": (re.compile(r"if param\.is_cuda:"), "if not cpu_copy:"),
        "pinned copies": (re.compile(r"\.cpu\(\)\.pin_memory\(\)"), ""),
        "pinned gradients": (re.compile(r"pin_memory=self\.pin_cpu_grads"), "pin_memory=False"),
        "moved state": (re.compile(r"\.to\(\"cuda\"\)"), '.to("cpu")'),
    }
}
_matches: Counter[str] = Counter()


class _Stream(torch.cpu.Stream):
    """The only stream there is: it runs everything in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or torch.cpu.Event()

    def synchronize(self) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__


def _cpu_namespace() -> types.ModuleType:
    """What `torch.cuda` means inside megatron.core on a CPU; other names still reach torch.cuda and fail there."""
    namespace = types.ModuleType("megatron_core_cpu")
    cpu, stream = torch.device("cpu"), _Stream()
    namespace.__dict__.update(
        current_device=lambda: cpu,
        set_device=lambda *_: None,
        device_count=torch.cpu.device_count,
        synchronize=torch.cpu.synchronize,
        empty_cache=lambda: None,
        Stream=_Stream,
        Event=torch.cpu.Event,
        current_stream=lambda *_: stream,
        default_stream=lambda *_: stream,
        stream=lambda _: contextlib.nullcontext(),
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        is_available=lambda: False,
        FloatTensor=torch.FloatTensor,
        HalfTensor=torch.HalfTensor,
        BFloat16Tensor=torch.BFloat16Tensor,
        random=namespace,
        __getattr__=lambda name: getattr(torch.cuda, name),
    )
    return namespace


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module of megatron.core after rewriting its CUDA names; leaves the .pyc cache alone."""

    namespace = _cpu_namespace()

    def get_code(self, fullname: str) -> types.CodeType:
        source = self.get_data(self.path).decode()
        for name, (pattern, replacement) in (_RULES | _MODULE_RULES.get(fullname, {})).items():
            source, count = pattern.subn(replacement, source)
            _matches[name] += count
        return compile(source, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["_cpu"] = self.namespace
        super().exec_module(module)
        _MENDS.get(module.__name__, lambda _: None)(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Hands the modules of megatron.core to the rewriting loader."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "megatron.core" and not fullname.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Make `megatron.core` importable on a machine without CUDA; megarlhf.parallel calls it on import.

    Raises:
        RuntimeError: megatron.core was imported before.
    """
    if device_kind() == "gpu":
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before megarlhf.parallel; import megarlhf.parallel first")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron-Core compiles small functions; that buys nothing here
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # Megatron-Core calls collectives by names that this torch renames in a later release.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    sys.meta_path.insert(0, _Finder())


def verify() -> None:
    """Import what training needs, mend what it lacks, and check that every rewriting rule found its text.

    Raises:
        RuntimeError: a rule matches nothing, so this megatron-core is not the one the rules were written for.
    """
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401

    _mend_what_is_not_installed()
    rules = [*_RULES, *(name for own in _MODULE_RULES.values() for name in own)]
    idle = [name for name in rules if not _matches[name]]
    if device_kind() == "cpu" and idle:
        raise RuntimeError(
            f"megatron-core: the CPU rewriting rules {idle} match nothing; this version is not supported"
        )


@functools.cache
def _mend_what_is_not_installed() -> None:
    """Without TransformerEngine, and without any fused Adam, on a GPU as on a CPU."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer, optimizer_config
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if importlib.util.find_spec("transformer_engine") is None:
        # Where Megatron-Core puts mocks in place of TransformerEngine's layers, this module takes them for layers.
        multi_latent_attention.HAVE_TE = False
        optimizer_config.is_te_min_version = lambda *_, **__: False  # it would compare with no version
        bind_router_product(moe_utils)
    if optimizer.USING_PYTORCH_OPTIMIZER:
        _mend_optimizer(distrib_optimizer)
    _mend_gathering(distrib_optimizer.DistributedOptimizer)
    _mend_offload(optimizer.HybridDeviceOptimizer, distrib_optimizer.DistributedOptimizer)


def _mend_random_state(megatron_random: Any) -> None:
    """Megatron-Core queues RNG changes until CUDA starts, which never happens; apply them to the CPU generator."""
    megatron_random._set_cuda_rng_state = lambda new_state, *_, **__: torch.set_rng_state(new_state)


def _mend_optimizer(distrib_optimizer: Any) -> None:
    """Keep torch AdamW's tensor `step` apart per parameter when a distributed optimizer is loaded.

    The fused optimizers hold one integer per group. With torch's AdamW Megatron-Core's loader gives every parameter the
    same step tensor, which then advances once per parameter.
    """
    optimizer_class = distrib_optimizer.DistributedOptimizer
    set_states, load = optimizer_class._set_main_param_and_optimizer_states, optimizer_class.load_state_dict

    def set_states_but_step(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, tensors | {key: state[key] for key in ("step",) if key in state})

    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    optimizer_class._set_main_param_and_optimizer_states = set_states_but_step
    optimizer_class.load_state_dict = load_with_own_steps


def _mend_offload(hybrid: Any, distributed: Any) -> None:
    """Let the optimizer that steps on the host have float32 parameters, plain checkpoints and its own memory.

    Megatron-Core's shards of float32 parameters come with a history, which it refuses; it gives those on the device no
    gradient, and refreshes the copies of 16-bit ones alone. Its settings have classes in them, which a checkpoint must
    not have, and what a load gives it are views of the whole state of all data-parallel ranks.
    """
    set_states = distributed._set_main_param_and_optimizer_states
    groups = distributed._build_model_and_main_param_groups
    set_gradients, state_dict = hybrid._set_sub_optimizer_grads, hybrid.state_dict

    def set_all_gradients(self: Any) -> None:
        set_gradients(self)
        for param, inner in self.param_to_inner_param.items():
            if inner is param:
                param.grad = getattr(param, "decoupled_grad", param.grad)

    def update_by_state(self: Any) -> None:
        for param, state in self.state.items():
            self.param_to_inner_param[param].data.copy_(state["master_param"])

    def update_by_params(self: Any) -> None:
        for param, inner in self.param_to_inner_param.items():
            inner.data.copy_(param)

    def plain_state(self: Any) -> dict[str, Any]:
        found = state_dict(self)
        plain = [{k: v for k, v in group.items() if not isinstance(v, type)} for group in found["param_groups"]]
        return {**found, "param_groups": plain}

    def set_own_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        own = {key: tensor.clone() for key, tensor in tensors.items()} if isinstance(self.optimizer, hybrid) else None
        set_states(self, model_param, own or tensors)

    hybrid._set_sub_optimizer_grads, hybrid.state_dict = set_all_gradients, plain_state
    hybrid._update_fp32_params_by_new_state = update_by_state
    hybrid.update_fp32_param_by_new_param = update_by_params
    distributed._build_model_and_main_param_groups = staticmethod(torch.no_grad()(groups))
    distributed._set_main_param_and_optimizer_states = set_own_states


def _mend_gathering(distributed: Any) -> None:
    """Collect the state of a replica that is alone without the copies, on the device too, that a gather makes."""
    gather = distributed.get_parameter_state_dp_zero

    def collect(self: Any, use_gloo_comm: bool = True, empty_data: bool = False, **options: Any) -> Any:
        if empty_data or self.data_parallel_group.size() > 1:
            return gather(self, use_gloo_comm=use_gloo_comm, empty_data=empty_data, **options)
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for number, (buffer, ranges) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
            ((dtype, buckets),) = ranges.items()
            keys = ("param", "exp_avg", "exp_avg_sq")
            whole = {key: torch.zeros(buffer.numel_unpadded, dtype=torch.float32) for key in keys}
            first = 0
            for bucket, places in zip(buffer.buckets, buckets, strict=True):
                for param, place in places["param_map"].items():
                    tensors, local = self._get_main_param_and_optimizer_states(param), place["gbuf_local"]
                    for key in keys:
                        whole[key][first + local.start : first + local.end].copy_(tensors[key].detach())
                first += bucket.numel_unpadded
            state[number] = {dtype: whole | {"numel_unpadded": buffer.numel_unpadded}}
        return state

    distributed.get_parameter_state_dp_zero = collect


def _mend_mappings(mappings: Any) -> None:
    """Gather and reduce-scatter parts of unequal length, which gloo cannot: tokens over expert-tensor ranks."""
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(part: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return gather(part, group, sizes, use_global_buffer)
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([whole[:size] for whole, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_uneven(
        whole: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return reduce_scatter(whole, group, sizes, use_global_buffer)
        summed = whole.clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed.split(list(sizes))[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


_MENDS = {
    "megatron.core.tensor_parallel.mappings": _mend_mappings,
    "megatron.core.tensor_parallel.random": _mend_random_state,
}
