"""Weight synchronisation against a plain copy: trainer's memory -> shared memory -> inference engine.

    python benchmarks/weight_sync.py [--model-dir models/smollm2] [--rounds 12]

A second process is the trainer, one Megatron rank with float32 weights, its optimizer and its buffers, which holds the
weights in shared memory and computes their checksum. This process runs vLLM and updates from there. Each round also
copies the same bytes without any of it: the trainer's memory to other shared memory, and from there to this process's
memory. Each half is timed in the process that does it; the rounds alternate, so both see the same neighbours. Target:
ratio at most 2.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.multiprocessing as multiprocessing  # noqa: E402

from examples.smollm2 import write_smollm2  # noqa: E402
from megarlhf.formats.shared_memory import checksum  # noqa: E402
from megarlhf.rollout.engine import RolloutEngine, engine_environment  # noqa: E402


def trainer(model_dir: Path, directory: Path, threads: int, pipe: Connection) -> None:
    """Answer "sync" by sharing the present weights with their checksum, "copy" by copying them; until None comes."""
    from megarlhf.data.planning import PackingOptions
    from megarlhf.engine.engine import MegatronEngine
    from megarlhf.engine.optimizer import OptimizerOptions
    from megarlhf.engine.sharing import SharedWeights
    from megarlhf.models.build import ModelOptions
    from megarlhf.parallel.groups import ParallelSizes, initialize_groups

    torch.set_num_threads(threads)
    initialize_groups(ParallelSizes(), rank=0, world_size=1, init_method=f"file://{directory}/meeting", seed=0)
    engine = MegatronEngine(
        model_dir,
        head="lm",
        model=ModelOptions(),
        packing=PackingOptions(max_tokens=512, share_prefix=False),
        optimizer=OptimizerOptions(learning_rate=1e-6, total_steps=1),
        logprob_chunk_tokens=512,
    )
    weights = SharedWeights(engine)
    memory = torch.cat([parameter.detach().flatten() for _, parameter in engine.named_parameters()])
    copy = memory.clone().share_memory_()
    pipe.send((weights.blocks, copy))
    while (command := pipe.recv()) is not None:
        start = time.perf_counter()
        sent = ""
        if command == "sync":
            sent = checksum(weights.refresh())
        else:
            copy.copy_(memory)
        pipe.send((time.perf_counter() - start, sent))


def measure(model_dir: Path, directory: Path, threads: int, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes of the model, and seconds of each part in each round; the first round warms up and is left out."""
    pipe, remote = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=trainer, args=(model_dir, directory, threads, remote), daemon=True)
    process.start()
    engine = RolloutEngine(
        model_dir, dtype="float32", seed=0, max_model_len=512, max_num_seqs=32, kv_cache_gib=0.5, threads=threads
    )
    blocks, copy = pipe.recv()
    engine.connect_weights(blocks)
    memory = copy.clone()
    seconds: dict[str, list[float]] = {"share": [], "update": [], "copy in": [], "copy out": []}
    for version in range(rounds + 1):
        pipe.send("copy")
        copy_in, _ = pipe.recv()
        start = time.perf_counter()
        memory.copy_(copy)
        copy_out = time.perf_counter() - start
        pipe.send("sync")
        share, sent = pipe.recv()
        update = engine.update_weights(version, sent)["seconds"]
        if version:
            for name, value in zip(seconds, (share, update, copy_in, copy_out), strict=True):
                seconds[name].append(value)
    pipe.send(None)
    process.join()
    engine.close()
    return memory.nbytes, seconds


def report(num_bytes: int, seconds: dict[str, list[float]]) -> None:
    """Medians and minima, and the ratio of synchronisation to copy."""
    print(f"{num_bytes / 1e6:.0f} MB, {len(seconds['share'])} rounds, milliseconds: median (minimum)")
    for name, values in seconds.items():
        print(f"  {name:10}{1e3 * statistics.median(values):7.1f} ({1e3 * min(values):.1f})")
    sync = [a + b for a, b in zip(seconds["share"], seconds["update"], strict=True)]
    copy = [a + b for a, b in zip(seconds["copy in"], seconds["copy out"], strict=True)]
    print(f"  {'sync':10}{1e3 * statistics.median(sync):7.1f} ({1e3 * min(sync):.1f})   share + update")
    print(f"  {'copy':10}{1e3 * statistics.median(copy):7.1f} ({1e3 * min(copy):.1f})   memory -> shared -> memory")
    print(f"  ratio {statistics.median(sync) / statistics.median(copy):.2f} ({min(sync) / min(copy):.2f}), target 2.00")


def main() -> None:
    """Start again with the environment of an engine, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    environment = engine_environment(threads=threads)
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)
    write_smollm2(arguments.model_dir)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="megarlhf-benchmark-") as directory:
        report(*measure(arguments.model_dir, Path(directory), threads, arguments.rounds))


if __name__ == "__main__":
    main()
