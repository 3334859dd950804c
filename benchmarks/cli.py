"""How long the command line takes to answer what needs no model, beside Python's own start and `import torch`.

    python benchmarks/cli.py [--rounds 5]

Medians of commands in turns, so that all see the same neighbours. Target: each answer in under a second on a quiet
machine.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ("sft", "rm", "prm", "dpo", "kto", "kd")
MAIN = "-m megarlhf.cli.main"
COMMANDS = {
    "python, no more than its start": ["-c", "pass"],
    "python -c 'import torch'": ["-c", "import torch"],
    **{
        f"megarlhf {words}": [*MAIN.split(), *words.split()]
        for words in (
            "--version",
            "--help",
            *(f"{program} --help" for program in ("ppo", *PROGRAMS, "preprocess")),
            "flags",
            "ppo --help vllm",
            "ppo --help megatron",
            "parity --help",
            "inspect --help",
            "convert hf-to-megatron --help",
            "ppo --train_iter 3",
            *(f"{program} --train_iters many" for program in PROGRAMS),
            "preprocess --inptu corpus.jsonl",
            "ppo --pretrain nowhere --prompt_data nowhere.jsonl --save runs/new",
        )
    },
    **{f"tools/{name}.py --help": [f"tools/{name}.py", "--help"] for name in ("preprocess_data", "merge_lora")},
}


def seconds(arguments: list[str]) -> float:
    """Of one process of Python from start to end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Run all commands in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    times = [[seconds(arguments) for arguments in COMMANDS.values()] for _ in range(rounds)]
    for name, of_command in zip(COMMANDS, zip(*times, strict=True), strict=True):
        print(f"{statistics.median(of_command):6.2f} s  {name}")


if __name__ == "__main__":
    main()
