"""Checkpoint conversion against `cp` of the same bytes, and its peak memory.

    python benchmarks/convert.py [--model-dir models/smollm2] [--rounds 3] [--directory DIR] [--dtype bf16] [--smoke]

For SmolLM2 and a random Llama of 1.2 billion parameters, made on the spot: HF -> Megatron, Megatron -> HF, and `cp`
with `sync` of the weight files, in turn, so that all see the same neighbours. Source files are dropped from the page
cache before each. Conversion runs in a process of its own and is timed after its imports; it writes a manifest with
SHA-256 and syncs what it writes. Target: ratio at most 2.5, memory at most the largest Megatron parameter with its HF
tensors plus 1 GiB over what the imports took, with any number of threads.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

_SIZES = {
    "1.2B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
    "smoke": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1000},
}


def write_random_llama(directory: Path, size: str, dtype: str) -> None:
    """A Llama checkpoint with random numbers, one tensor in memory at a time."""
    import torch
    from transformers import LlamaConfig

    from megarlhf.formats.safetensors_file import TensorFiles, TensorSpec, create_tensor_file
    from megarlhf.models.registry import find_architecture

    config = LlamaConfig(
        **_SIZES[size],
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype={"bf16": "bfloat16", "fp32": "float32"}[dtype],
    )
    config.save_pretrained(directory)
    arch = find_architecture(config)
    sizes = arch.dimensions(config)
    specs = [
        TensorSpec(name, tuple(sizes[part] for part in shape), {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
        for weight in arch.weight_maps(config, tied=True, head="lm")
        for name, shape in zip(weight.hf, weight.shapes, strict=True)
    ]
    path = directory / "model.safetensors"
    create_tensor_file(path, specs)
    with TensorFiles([path], writable=True) as file:
        for spec in specs:
            file.write(spec.name, torch.empty(spec.shape).uniform_(-0.05, 0.05))
        file.sync()


def convert(direction: str, load: Path, save: Path) -> dict[str, float]:
    """One conversion in this process: seconds, and resident bytes before and at most."""
    from megarlhf.cli.convert import prepare_process

    prepare_process()
    from megarlhf.conversion.steps import ConvertOptions, default_threads
    from megarlhf.conversion.to_hf import megatron_to_hf
    from megarlhf.conversion.to_megatron import hf_to_megatron
    from megarlhf.parallel.cpu import megatron_cpu

    megatron_cpu.verify()  # imports the rest of Megatron-Core
    make_room(load, save)
    options, before, start = ConvertOptions(threads=default_threads()), peak_bytes(), time.perf_counter()
    cpu_before = time.process_time()
    if direction == "to_megatron":
        hf_to_megatron(load, save, tensor=1, pipeline=1, expert=1, head=None, options=options)
    else:
        megatron_to_hf(str(load), save, hf_model=None, role="actor", max_shard_bytes=5 * 10**9, options=options)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_before
    return {"seconds": seconds, "cpu": cpu, "before": before, "peak": peak_bytes()}


def peak_bytes() -> int:
    """High-water mark of this program's resident memory; getrusage's would include the program that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def make_room(load: Path, save: Path) -> None:
    """Remove the target, and forget the source's files: they are read from the disk next time.

    Right before the clock starts: a virtual machine soon gives free memory back to its host, and fetching it again
    takes longer than the copy.
    """
    shutil.rmtree(save, ignore_errors=True)
    for path in load.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def in_own_process(direction: str, load: Path, save: Path) -> dict[str, float]:
    """`convert` in a new process, whose start is in "wall" only."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--convert", direction, str(load), str(save)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result | {"wall": time.perf_counter() - start}


def copy(load: Path, save: Path) -> float:
    """Seconds of `cp` and `sync` of the weight files."""
    make_room(load, save)
    save.mkdir()
    files = sorted(map(str, load.glob("*.safetensors")))
    start = time.perf_counter()
    subprocess.run(["cp", *files, str(save)], check=True)
    subprocess.run(["sync", *(str(save / Path(name).name) for name in files)], check=True)
    return time.perf_counter() - start


def measure(title: str, model: Path, directory: Path, rounds: int) -> None:
    """Print the medians of all rounds; the first, which warms up, is left out."""
    megatron, hf, copied = directory / "megatron", directory / "hf", directory / "copy"
    results: list[tuple[float, Any, Any]] = []
    for _ in range(rounds + 1):
        seconds = copy(model, copied)
        to_megatron = in_own_process("to_megatron", model, megatron)
        results.append((seconds, to_megatron, in_own_process("to_hf", megatron, hf)))
    num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    baseline = statistics.median(seconds for seconds, _, _ in results[1:])
    print(f"{title}: {num_bytes / 1e6:.0f} MB, {rounds} rounds; cp and sync {baseline:.2f} s")
    for name, runs in (
        ("HF -> Megatron", [a for _, a, _ in results[1:]]),
        ("Megatron -> HF", [b for _, _, b in results[1:]]),
    ):
        seconds, cpu, wall = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "wall"))
        ratio = statistics.median(run["seconds"] / s for run, (s, _, _) in zip(runs, results[1:], strict=True))
        added = max(run["peak"] - run["before"] for run in runs)
        print(
            f"  {name}: {seconds:6.2f} s, {num_bytes / seconds / 1e9:.2f} GB/s, {ratio:.2f} times cp (target 2.50); "
            f"{cpu:.2f} s of CPU, {wall:.1f} s with start; "
            f"memory {added / 2**20:.0f} MiB over {runs[0]['before'] / 2**20:.0f} MiB"
        )


def main() -> None:
    """Measure every model, or do one conversion for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write, on the disk to measure; several times a model")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the random Llama")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one round")
    parser.add_argument("--convert", nargs=3, metavar=("DIRECTION", "LOAD", "SAVE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        direction, load, save = arguments.convert
        print(json.dumps(convert(direction, Path(load), Path(save))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="megarlhf-convert-") as name:
        directory = Path(name)
        if not arguments.smoke:
            from examples.smollm2 import write_smollm2

            measure("SmolLM2-135M", write_smollm2(arguments.model_dir), directory, arguments.rounds)
        size = "smoke" if arguments.smoke else "1.2B"
        write_random_llama(directory / "llama", size, arguments.dtype)
        rounds = 1 if arguments.smoke else arguments.rounds
        measure(f"random Llama {size} {arguments.dtype}", directory / "llama", directory, rounds)


if __name__ == "__main__":
    main()
