"""TensorFile: the format as safetensors reads it, shared writes, and refusals."""

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

from megarlhf.formats.safetensors_file import TensorFile, TensorSpec, tensor_places

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
    with TensorFile.create(path, SPECS) as file:
        for name, value in values().items():
            file.view(name).copy_(value)
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
    assert TensorFile(path).names == [s.name for s in SPECS]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 64 == 0 and json.loads(raw[8 : 8 + length])["a.k"]["data_offsets"] == [60, 100]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_opens_files_of_safetensors(tmp_path: Path) -> None:
    tensors = {"z": torch.arange(6.0).view(2, 3), "a": torch.arange(4, dtype=torch.int64)}
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert all(torch.equal(file.view(n), t) for n, t in tensors.items())


def test_another_process_writes_in_place(path: Path) -> None:
    reader = TensorFile(path)
    view = reader.view("b.q")
    code = "from megarlhf.formats.safetensors_file import TensorFile as T; "
    code += f"T({str(path)!r}).view('b.q').fill_(7)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert bool((view == 7).all())
    reader.close()
    path.unlink()
    assert bool((view == 7).all())


def test_create_refuses(tmp_path: Path, path: Path) -> None:
    with pytest.raises(FileExistsError):
        TensorFile.create(path, SPECS)
    with pytest.raises(ValueError, match="wider types first"):
        TensorFile.create(tmp_path / "x", [SPECS[-1], SPECS[0]])
    with pytest.raises(ValueError, match="complex128"):
        TensorFile.create(tmp_path / "x", [TensorSpec("c", (1,), torch.complex128)])
    with pytest.raises(OSError):
        TensorFile.create(tmp_path / "x", [TensorSpec("huge", (1 << 50,), torch.uint8)])
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
            TensorFile(path)
