"""The one place that knows whether this process computes with CUDA or on the CPU."""

import ctypes
import gc
import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

DeviceKind = Literal["cpu", "gpu"]
WEIGHT_GRADIENT_MODULE = "fused_weight_gradient_mlp_cuda"  # what Megatron-Core's fused gradient accumulation imports


def device_kind() -> DeviceKind:
    """ "gpu" where PyTorch sees one, else "cpu"."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def current_device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if device_kind() == "gpu" else torch.device("cpu")


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def host_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def num_local_gpus() -> int:
    """GPUs of this machine; 0 on a CPU machine."""
    return torch.cuda.device_count()


def device_memory_bytes() -> int | None:
    """Memory of one of this machine's GPUs; None on a CPU machine, where it is not a process's own."""
    return torch.cuda.get_device_properties(0).total_memory if device_kind() == "gpu" else None


def device_capability() -> tuple[int, int] | None:
    """CUDA's compute capability of this process's GPU, (9, 0) for an H100; None on a CPU machine."""
    return torch.cuda.get_device_capability() if device_kind() == "gpu" else None


def settle() -> None:
    """Wait until what this process has begun on its device is done: other processes' streams know nothing of it."""
    if device_kind() == "gpu":
        torch.cuda.synchronize()


def finish_computing() -> None:
    """Wait until what this process has begun to compute is done; communication may go on beside it."""
    if device_kind() == "gpu":
        torch.cuda.current_stream().synchronize()


def release_memory() -> None:
    """Give back what is freed, with garbage that is in circles; see release_cache."""
    gc.collect()
    release_cache()


def release_cache() -> None:
    """Give freed memory back: CUDA's cache to the device, the heap that glibc keeps to the system."""
    if device_kind() == "gpu":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def host_bytes(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 of host memory for copies of what is on the device; pinned where that is a GPU."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device_kind() == "gpu")


def freeze_garbage_collector() -> None:
    """Call once a process is set up: modules and models, which live as long as it does, are not searched any more.

    Each phase ends with a collection, which otherwise walks through all of PyTorch and its like.
    """
    gc.collect()
    gc.freeze()


def local_device_names() -> list[str]:
    """Names of this machine's GPUs, in the order of their numbers, as CUDA_VISIBLE_DEVICES has them."""
    given, number = os.environ.get("CUDA_VISIBLE_DEVICES"), num_local_gpus()
    return list(map(str, range(number))) if given is None else given.split(",")[:number]


def visible_devices_environment(names: Sequence[str]) -> dict[str, str]:
    """Environment that shows a worker process its own GPUs only, by their names in CUDA_VISIBLE_DEVICES."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(names), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def check_device(planned: DeviceKind, num_planned: int, *, kind: DeviceKind, num_gpus: int) -> None:
    """Compare what the plan gives a process with the `kind` and `num_gpus` that PyTorch sees.

    Raises:
        RuntimeError: it sees something else.
    """
    if planned == kind and (kind == "cpu" or num_planned == num_gpus):
        return
    asked = f"{num_planned} GPU(s)" if planned == "gpu" else "CPU cores"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    raise RuntimeError(
        f"the plan gives this worker {asked} and PyTorch sees {num_gpus} GPU(s), with CUDA_VISIBLE_DEVICES {visible}: "
        "start it where the plan's devices are, with a PyTorch built for them"
    )
