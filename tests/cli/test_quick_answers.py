"""Help, versions and mistakes in what was typed are answered before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

from megarlhf.cli.flags import SUPERVISED

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "pandas", "ray", "vllm", "megatron", "matplotlib")

OWN = {"kd": ["--teacher_model", "/nowhere"], "prm": ["--placeholder_token", "z"]}  # what has no default

# Answers each command line in turn; after each, the heavy modules that have come in.
ANSWER = """
import contextlib, io, json, runpy, sys
from megarlhf.cli.main import main

heavy, answers = sys.argv[1:], []
for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if words[:1] and words[0].endswith(".py"):
                sys.argv[:] = words
                runpy.run_path(words[0], run_name="__main__")
            status = main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    answers.append((status, said.getvalue(), [name for name in heavy if name in sys.modules]))
print(json.dumps(answers))
"""


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train_iters: many\n")
    places = ["--pretrain", "/nowhere", "--dataset", "/nowhere", "--save", "x"]
    tool = {name: str(ROOT / "tools" / f"{name}.py") for name in ("preprocess_data", "merge_lora")}
    corpus = ["--input", "/nowhere", "--output_prefix", "x", "--tokenizer_model", "/nowhere"]
    corpus += ["--tokenizer_type", "HuggingFaceTokenizer"]
    merged = ["--model_path", "/nowhere", "--lora_path", "/nowhere", "--output_path", "x"]
    preprocess = ("preprocess", tool["preprocess_data"])
    given = ["--pretrain", "/nowhere", "--prompt_data", "/nowhere"]
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
        (["generate", "--help"], 0, "--csft-prompt"),
        (["score", "--help"], 0, "--reward-pretrain"),
        (["select", "--help"], 0, "--post-processor"),
        (["iterate", "--help"], 0, "--num-rounds"),
        (["generate", *given, "--output", "o.txt"], 2, "must end in .jsonl"),
        (["score", "--dataset", "/nowhere", "--output", "o.jsonl"], 2, "nothing scores"),
        (["select", "--dataset", "/nowhere", "--output", "o.jsonl", "--post_processor", "rs"], 2, "/nowhere"),
        (["iterate", *given, "--method", "iterative_dpo", "--save", "x", "--num_rounds", "0"], 2, "num_rounds=0"),
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
        ([*rl, "--prompt_data", "/nowhere.parquet", "--top_p", "1.9"], 2, "top_p=1.9"),
        (["flags"], 0, "train_prm of OpenRLHF, megarlhf prm:"),
        (["flags", "--help"], 0, "usage: megarlhf flags"),
        (["flags", "nothing"], 2, "no program 'nothing'"),
        *(([program, "--help"], 0, "--append-eod") for program in preprocess),
        (["preprocess", "--inptu", "x"], 2, "did you mean --input?"),
        *(([program, *corpus], 2, "input=/nowhere is not") for program in preprocess),
        *(([program, "--help"], 0, "--lora-path") for program in ("merge_lora", tool["merge_lora"])),
        ([tool["merge_lora"], "--lora_pth", "x"], 2, "did you mean --lora_path?"),
        ([tool["merge_lora"]], 2, "model_path is missing"),
        ([tool["merge_lora"], *merged], 2, "model_path=/nowhere is not a local directory\nlora_path=/nowhere is not"),
        *(([program, "--help"], 0, "--learning-rate") for program in SUPERVISED),
        *(([program, "--train_iter", "3"], 2, "did you mean --train_iters?") for program in SUPERVISED),
        *(([program, "--max_epochs", "many"], 2, "max_epochs") for program in SUPERVISED),
        *(([program], 2, "pretrain is missing") for program in SUPERVISED),
        *(([program, *places, *OWN.get(program, [])], 2, "dataset=/nowhere does not") for program in SUPERVISED),
        (["parity", "--pretrain", "/nowhere", "--num_groups", "0"], 2, "num_groups=0"),
    ]
    asked = json.dumps([words for words, _, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, *HEAVY], input=asked, capture_output=True, text=True, check=True
    )
    for (words, status, text), answer in zip(cases, json.loads(done.stdout), strict=True):
        assert answer[0] == status and text in answer[1], (words, answer)
        assert answer[2] == [], (words, "imported", answer[2])
