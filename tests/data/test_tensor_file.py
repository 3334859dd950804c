"""TensorFile: the format as safetensors reads it, shared writes, and refusals."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megarlhf.data.tensor_file import TensorFile, TensorSpec, adjacent_order, run_side_by_side

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
    with TensorFile.create(path, SPECS, {"format": "pt"}) as file:
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
    file = TensorFile.open(path)
    assert file.names == [s.name for s in SPECS] and list(file.specs) == SPECS
    assert file.metadata == {"format": "pt"}
    assert file.num_bytes == 15 * 4 + 10 * 4 + 4 + 14 + 0 + 3
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 64 == 0 and json.loads(raw[8 : 8 + length])["a.k"]["data_offsets"] == [60, 100]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_opens_files_of_safetensors(tmp_path: Path) -> None:
    tensors = {"z": torch.arange(6.0).view(2, 3), "a": torch.arange(4, dtype=torch.int64)}
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    file = TensorFile.open(tmp_path / "x.safetensors")
    assert file.metadata == {"k": "v"} and all(torch.equal(file.view(n), t) for n, t in tensors.items())


def test_another_process_writes_in_place(path: Path) -> None:
    reader = TensorFile.open(path)
    view, before = reader.view("b.q"), reader.checksum()
    code = "from megarlhf.data.tensor_file import TensorFile as T; "
    code += f"T.open({str(path)!r}, writable=True).view('b.q').fill_(7)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert bool((view == 7).all()) and reader.checksum() != before
    reader.close()
    path.unlink()
    assert bool((view == 7).all())


def test_checksum_is_the_documented_hash_and_sees_one_bit(path: Path) -> None:
    file = TensorFile.open(path, writable=True)
    data = path.read_bytes()[-file.num_bytes :]
    sizes = [60, 40, 4, 14, 0, 3]
    parts = [data[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    oracle = xxhash.xxh3_128_hexdigest(b"".join(map(xxhash.xxh3_64_digest, parts)))
    assert file.checksum() == file.checksum({name: file.digest(name) for name in file.names}) == oracle
    file.view("mask")[-1] ^= True
    changed = file.checksum()
    assert changed != oracle
    file.flush()
    assert TensorFile.open(path).checksum() == changed


def test_write_converts_and_returns_the_digest(path: Path) -> None:
    file = TensorFile.open(path, writable=True)
    digest = file.write("half", torch.arange(7.0))
    assert digest == xxhash.xxh3_64_digest(torch.arange(7.0).bfloat16().view(torch.uint8).numpy().tobytes())
    assert file.view("half").tolist() == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        file.write("a.k", torch.zeros(5, 2))


def test_fused_view_needs_neighbours(path: Path) -> None:
    file = TensorFile.open(path)
    fused = file.fused_view(["b.q", "a.k"])
    assert fused is not None and torch.equal(fused, torch.cat([values()["b.q"], values()["a.k"]]))
    assert fused.data_ptr() == file.view("b.q").data_ptr()
    assert file.fused_view(["a.k", "b.q"]) is None  # other order
    assert file.fused_view(["b.q", "half"]) is None  # not adjacent
    assert file.fused_view(["a.k", "scalar"]) is None  # adjacent, other shape


def test_create_refuses(tmp_path: Path, path: Path) -> None:
    with pytest.raises(FileExistsError):
        TensorFile.create(path, SPECS)
    with pytest.raises(ValueError, match="occurs twice"):
        TensorFile.create(tmp_path / "x", [SPECS[0], SPECS[0]])
    with pytest.raises(ValueError, match="wider types first"):
        TensorFile.create(tmp_path / "x", [SPECS[-1], SPECS[0]])
    with pytest.raises(ValueError, match="complex64"):
        TensorFile.create(tmp_path / "x", [TensorSpec("c", (1,), torch.complex64)])
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
            TensorFile.open(path)


def test_adjacent_order_joins_the_parts_of_fused_layers() -> None:
    names = ["emb", "0.k_proj.bias", "0.k_proj.weight", "0.o_proj.weight", "0.q_proj.bias", "0.q_proj.weight"]
    names += ["0.up_proj.weight", "0.v_proj.bias", "0.v_proj.weight", "1.k_proj.weight", "0.gate_proj.weight"]
    ordered = adjacent_order(names)
    assert ordered == [
        "emb",
        *("0.q_proj.bias", "0.k_proj.bias", "0.v_proj.bias"),
        *("0.q_proj.weight", "0.k_proj.weight", "0.v_proj.weight"),
        "0.o_proj.weight",
        *("0.gate_proj.weight", "0.up_proj.weight"),
        "1.k_proj.weight",
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_run_side_by_side_keeps_order_and_thread_counts(threads: int) -> None:
    before = torch.get_num_threads()
    seen = run_side_by_side(lambda i: (i, torch.get_num_threads()), range(20), threads)
    assert seen == [(i, before if threads == 1 else 1) for i in range(20)]
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        run_side_by_side(lambda i: 1 // i, range(2), threads)


def test_write_gives_the_digests_of_the_checksum(path: Path) -> None:
    file = TensorFile.open(path, writable=True)
    changed = {name: torch.ones_like(value) for name, value in values().items()}
    changed["b.q"] = changed["b.q"].t().contiguous().t()
    digests = {name: file.write(name, value) for name, value in changed.items()}
    assert file.checksum(digests) == TensorFile.open(path).checksum()
    assert all(torch.equal(file.view(name), value) for name, value in changed.items())


def test_run_side_by_side_starts_nothing_after_a_failure() -> None:
    started = []

    def fail_first(index: int) -> None:
        started.append(index)
        if index == 0:
            raise RuntimeError("first")
        time.sleep(0.05)

    with pytest.raises(RuntimeError, match="first"):
        run_side_by_side(fail_first, range(40), 2)
    assert len(started) < 5
