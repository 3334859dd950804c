"""Help, versions and mistakes in what was typed are answered before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "datasets", "pandas", "ray", "vllm", "megatron", "matplotlib")

# Answers each command line in turn; after each, the heavy modules that have come in.
ANSWER = """
import contextlib, io, json, sys
from megarlhf.cli.main import main

answers = []
for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    answers.append((status, said.getvalue(), [name for name in sys.argv[1:] if name in sys.modules]))
print(json.dumps(answers))
"""


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train_iters: many\n")
    rl = ["ppo", "--pretrain", "/nowhere/model", "--save", "/dev/null/run"]
    cases: list[tuple[list[str], int, str]] = [
        ([], 0, "usage: megarlhf COMMAND"),
        (["--help"], 0, "usage: megarlhf COMMAND"),
        (["--version"], 0, "0."),
        (["pppo"], 2, "no command 'pppo'"),
        (["ppo", "--help"], 0, "--eps-clip-high"),
        (["ppo", "--help", "vllm"], 0, "--vllm-max-num-batched-tokens"),
        (["ppo", "--help", "megatron"], 0, "--moe-permute-fusion"),
        (["ppo", "--vllm_seed", "3"], 2, "--vllm_seed cannot be passed on; set seed"),
        (["sft", "--help"], 0, "--output-key"),
        (["parity", "--help"], 0, "--objectives"),
        (["inspect", "--help"], 0, "--role"),
        (["convert", "--help"], 0, "hf-to-megatron|megatron-to-hf"),
        (["convert", "hf-to-megatron", "--help"], 0, "--target-tensor-parallel-size"),
        (["convert", "megatron-to-hf", "--help"], 0, "--max-shard-size"),
        (["ppo", "--train_iter", "3"], 2, "did you mean --train_iters?"),
        (["sft", "--train-iters", "many", "--pretrain", "x", "--dataset", "x", "--save", "x"], 2, "train-iters"),
        (["convert", "hf-to-megatron", "--lod", "x"], 2, "did you mean --load?"),
        (["convert", "megatron-to-hf", "--load", "/nowhere", "--save", "x", "--num_threads", "0"], 2, "num_threads=0"),
        (["convert", "hf-to-megatron", "--load", "/nowhere", "--save", "/dev/null/x"], 2, "save=/dev/null/x cannot be"),
        (["convert", "megatron-to-hf", "--load", "/nowhere", "--save", "n" * 250], 2, ".partial cannot be made"),
        (["ppo", "--config", str(tmp_path / "bad.yaml")], 2, "train_iters='many'"),
        ([*rl, "--prompt_data", "/nowhere.parquet", "--top_p", "0.9"], 2, "top_p=0.9"),
        (["sft", "--pretrain", "/nowhere", "--dataset", "/nowhere", "--save", "x"], 2, "dataset=/nowhere does not"),
        (["parity", "--pretrain", "/nowhere", "--num_groups", "0"], 2, "num_groups=0"),
    ]
    asked = json.dumps([words for words, _, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, *HEAVY], input=asked, capture_output=True, text=True, check=True
    )
    for (words, status, text), answer in zip(cases, json.loads(done.stdout), strict=True):
        assert answer[0] == status and text in answer[1], (words, answer)
        assert answer[2] == [], (words, "imported", answer[2])
