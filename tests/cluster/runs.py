"""Start whole runs as a user does, from a command line, and read what they leave."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REWARD = """
def reward_func(queries, prompts, labels):
    # The share of even characters after an even prompt, of odd ones after an odd one: dense, cheap, a function of
    # prompt and response, so that a mix-up changes it.
    wanted = ["02468" if p[0] in "02468" else "13579" for p in prompts]
    responses = [q[len(p):] for q, p in zip(queries, prompts)]
    return [sum(c in w for c in r) / max(1, len(r)) for r, w in zip(responses, wanted)]
"""


def write_inputs(directory: Path, *, count: int = 24) -> dict[str, str]:
    """Prompt data and a reward file; returns the flags that name them."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"input": f"{i % 10}{i // 10}{(i * 7) % 10}=", "label": "0"} for i in range(count)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"input": f"9{i}{i}=", "label": "0"} for i in range(4)]
    (directory / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (directory / "reward.py").write_text(REWARD)
    return {
        "--prompt_data": str(directory / "prompts.jsonl"),
        "--eval_data": str(directory / "eval.jsonl"),
        "--reward_function": str(directory / "reward.py"),
    }


SMALL = {
    "--rollout_batch_size": "8",
    "--n_samples_per_prompt": "2",
    "--global-batch-size": "8",
    "--micro-batch-size": "8",
    "--prompt_max_len": "16",
    "--generate_max_len": "8",
    "--actor_learning_rate": "1e-3",
    "--critic_learning_rate": "1e-3",
    "--lr_warmup_ratio": "0",
    "--vllm_kv_cache_gib": "0.25",
    "--eval-interval": "100",
    "--seed": "7",
}


def command(program: str, flags: dict[str, str | None]) -> list[str]:
    """A command line; a flag with value None is bare."""
    words = [word for flag, value in flags.items() for word in ([flag] if value is None else [flag, value])]
    return [sys.executable, "-m", f"megarlhf.cli.{program}", *words]


class Run(subprocess.Popen[str]):
    """A run in the background, whose output goes to a file, so that nobody need read it meanwhile."""

    def __init__(self, words: list[str]) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        self.output = tempfile.TemporaryFile("w+")
        super().__init__(words, stdout=self.output, stderr=subprocess.STDOUT, text=True, env=environment)

    def read(self) -> str:
        """What it has printed, stdout and stderr together."""
        self.output.seek(0)
        return self.output.read()


def start(program: str, flags: dict[str, str | None]) -> Run:
    """Start a run in the background."""
    return Run(command(program, flags))


def run(program: str, flags: dict[str, str | None], *, expect: int = 0) -> str:
    """Run to the end and return the output."""
    process = start(program, flags)
    process.wait(timeout=600)
    output = process.read()
    assert process.returncode == expect, output
    return output


def metrics(save: Path) -> dict[int, dict[str, float]]:
    """Logged rows by step."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return {int(row["step"]): row for row in map(json.loads, lines)}
