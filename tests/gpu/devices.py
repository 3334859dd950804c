"""Tests whose body runs on either device: here on the CPU, and by `make test-gpu` on a GPU."""

import shutil
from importlib.util import find_spec

import pytest

from megarlhf.parallel.device import device_kind

NO_GPU = "no CUDA GPU: PyTorch sees none"
HAS_GPU = "PyTorch sees a GPU: what is meant for the CPU would compute there"
_CPU = pytest.mark.skipif(device_kind() == "gpu", reason=HAS_GPU)
_GPU = (pytest.mark.gpu, pytest.mark.skipif(device_kind() == "cpu", reason=NO_GPU))

on_cpu_and_gpu = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=_CPU), pytest.param("cuda", marks=_GPU, id="gpu")]
)
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=_GPU, id="gpu")])
needs_compiler = pytest.mark.skipif(
    find_spec("triton") is None or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="torch.compile needs Triton and a C compiler",
)
