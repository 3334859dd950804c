"""Tensors between Ray processes as plain bytes.

A step sends thousands of tensors of a few numbers each. PyTorch's own pickling writes every one as a file with a
header, which takes several times as long.
"""

import ray
import torch
from torch import Tensor

Packed = tuple[bytes, torch.dtype, tuple[int, ...]]


def pack(tensor: Tensor) -> Packed:
    """Bytes, dtype and shape; the device and the gradient's history are not kept."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes(), tensor.dtype, tuple(tensor.shape)


def unpack(packed: Packed) -> Tensor:
    """A CPU tensor with memory of its own."""
    data, dtype, shape = packed
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def register_tensors() -> None:
    """Make Ray use these for what this process sends; call once Ray is initialized."""
    ray.util.register_serializer(Tensor, serializer=pack, deserializer=unpack)
