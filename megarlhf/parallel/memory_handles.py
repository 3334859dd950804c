"""Memory of a device as other processes on it see it, by a handle: CUDA IPC on a GPU, shared memory of a host."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from megarlhf.formats.shared_memory import SharedBlock, describe_block, map_region
from megarlhf.parallel.device import current_device, device_kind

_DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: the number that the owner's device has in this process


@dataclass(frozen=True, kw_only=True)
class MemoryHandle:
    """What another process opens a tensor with; it goes through any pickle."""

    device: str
    shape: tuple[int, ...]
    opened_with: Any


def device_name() -> str:
    """Of this process's device, alike in all processes that have it: a GPU's UUID."""
    return str(torch.cuda.get_device_properties(current_device()).uuid) if device_kind() == "gpu" else "cpu"


def shareable_bytes(*shape: int) -> Tensor:
    """uint8 on this process's device, which others can open."""
    memory = torch.empty(shape, dtype=torch.uint8, device=current_device())
    if device_kind() == "cpu":
        memory.untyped_storage().share_memory_()
    return memory


def handle_of(memory: Tensor) -> MemoryHandle:
    """Of what shareable_bytes gave; valid as long as that is kept. Each handle is opened once by each process."""
    opened_with: Any = reduce_tensor(memory)[1] if memory.is_cuda else describe_block(memory, [])
    return MemoryHandle(device=device_name(), shape=tuple(memory.shape), opened_with=opened_with)


def open_memory(handle: MemoryHandle) -> Tensor:
    """The owner's memory, to be read: on a CPU writing ends the process with SIGSEGV."""
    if isinstance(block := handle.opened_with, SharedBlock):
        return map_region(block.path)[block.start : block.start + block.num_bytes].view(handle.shape)
    arguments = list(handle.opened_with)
    arguments[_DEVICE_ARGUMENT] = current_device().index
    memory: Tensor = rebuild_cuda_tensor(*arguments)
    return memory
