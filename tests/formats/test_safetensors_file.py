"""Tensor files: the format as safetensors reads it, writes of several processes, and refusals."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megarlhf.formats.safetensors_file import TensorFiles, TensorSpec, create_tensor_file, tensor_places

SPECS = [
    TensorSpec("b.q", (3, 5), torch.float32),
    TensorSpec("a.k", (2, 5), torch.float32),
    TensorSpec("scalar", (), torch.float32),
    TensorSpec("half", (7,), torch.bfloat16),
    TensorSpec("none", (0, 4), torch.bfloat16),
    TensorSpec("mask", (3,), torch.bool),
]


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {s.name: torch.randn(s.shape, generator=generator).to(s.dtype) for s in SPECS}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    create_tensor_file(path, SPECS)
    with TensorFiles([path], writable=True) as file:
        for name, value in values().items():
            file.write(name, value)
    return path


def test_safetensors_reads_what_was_written(path: Path) -> None:
    loaded = load_file(path)
    assert {name: (t.dtype, t.shape) for name, t in loaded.items()} == {s.name: (s.dtype, s.shape) for s in SPECS}
    for name, value in values().items():
        assert torch.equal(loaded[name], value), name
    with safe_open(path, "pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_layout_keeps_order_and_alignment(path: Path) -> None:
    assert [spec for _, spec in tensor_places(path).values()] == SPECS
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 64 == 0 and json.loads(raw[8 : 8 + length])["a.k"]["data_offsets"] == [60, 100]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_opens_files_of_safetensors(tmp_path: Path) -> None:
    tensors = {"z": torch.arange(6.0).view(2, 3), "a": torch.arange(4, dtype=torch.int64)}
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    with TensorFiles([tmp_path / "x.safetensors"]) as file:
        assert all(torch.equal(file.read(n), t) for n, t in tensors.items())


PARTS = {  # of a tensor that two write: the dimension that is cut
    "rows": ((6, 50), 0),
    "columns": ((40, 6), 1),
    "middle": ((3, 4, 5), 1),
    "line": ((10,), 0),
}
PART_SPECS = [TensorSpec(name, shape, torch.float32) for name, (shape, _) in PARTS.items()]
HALF = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from megarlhf.formats.safetensors_file import TensorFiles
from tests.formats.test_safetensors_file import PARTS, PART_SPECS
path, source, half = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with TensorFiles([path], specs=PART_SPECS) as file:
    for _ in range(30):
        for name, whole in load_file(source).items():
            axis, size = PARTS[name][1], whole.shape[PARTS[name][1]] // 2
            index = (*[slice(None)] * axis, slice(half * size, (half + 1) * size))
            file.write(name, whole.double()[index], index)
    file.sync()
"""


def test_two_processes_write_interleaved_parts_of_one_page(tmp_path: Path) -> None:
    """As ranks export: other bytes of the same page at the same time, of a file that neither has read."""
    path, expected = tmp_path / "w.safetensors", tmp_path / "expected.safetensors"
    generator = torch.Generator().manual_seed(3)
    wholes = {name: torch.randn(shape, generator=generator) for name, (shape, _) in PARTS.items()}
    save_file(wholes, expected)
    create_tensor_file(path, PART_SPECS)
    assert path.stat().st_size < 4096, "one page, the header too"
    words = [sys.executable, "-c", HALF, str(path), str(expected)]
    halves = [subprocess.Popen([*words, half], cwd=Path(__file__).parents[2]) for half in "01"]
    assert [half.wait(timeout=300) for half in halves] == [0, 0]
    found = load_file(path)
    assert found.keys() == wholes.keys()
    for name, whole in wholes.items():
        assert found[name].numpy().tobytes() == whole.numpy().tobytes(), name


def test_a_part_larger_than_its_place_is_a_bug(path: Path) -> None:
    with TensorFiles([path], specs=SPECS) as file, pytest.raises(AssertionError):
        file.write("b.q", torch.zeros(3, 5), (slice(0, 2),))


def test_create_refuses(tmp_path: Path, path: Path) -> None:
    with pytest.raises(FileExistsError):
        create_tensor_file(path, SPECS)
    with pytest.raises(ValueError, match="wider types first"):
        create_tensor_file(tmp_path / "x", [SPECS[-1], SPECS[0]])
    with pytest.raises(ValueError, match="complex128"):
        create_tensor_file(tmp_path / "x", [TensorSpec("c", (1,), torch.complex128)])
    with pytest.raises(OSError):
        create_tensor_file(tmp_path / "x", [TensorSpec("huge", (1 << 50,), torch.uint8)])
    assert not (tmp_path / "x").exists()


def test_open_refuses_damage(path: Path) -> None:
    raw = path.read_bytes()
    for damaged, message in [
        (raw[:-1], "cut short"),
        (raw[:4], "4 bytes"),
        (b"\xff" * 8 + raw[8:], "header length"),
        (raw[:8] + b"[" + raw[9:], "does not parse"),
        (raw.replace(b"[60,100]", b"[64,104]"), "holes"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            TensorFiles([path])
