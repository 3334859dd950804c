"""Tensors survive the way between processes."""

import pytest
import torch

from megarlhf.cluster.serialization import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
    found = unpack(pack(tensor))
    assert found.dtype == dtype and found.shape == shape and torch.equal(found, tensor)


def test_a_view_that_is_not_contiguous() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(unpack(pack(tensor)), tensor)


def test_the_copy_can_be_written() -> None:
    tensor = torch.zeros(2)
    found = unpack(pack(tensor))
    found += 1
    assert found.tolist() == [1, 1] and tensor.tolist() == [0, 0]
