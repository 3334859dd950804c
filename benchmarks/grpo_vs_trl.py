"""Seconds of a GRPO step on CPU cores: megarlhf against TRL's GRPOTrainer, same model, prompts, lengths and reward.

    python examples/smollm2.py models/smollm2
    python benchmarks/grpo_vs_trl.py --model models/smollm2          # about 10 minutes
    python benchmarks/grpo_vs_trl.py --model models/smollm2 --long_prompts
    python benchmarks/grpo_vs_trl.py --smoke                         # one tiny step of each side, for CI

A side is a process of its own, held to the same cores; sides take turns, so that a drift of the machine meets both.
Every step has the same 4 prompts (--long_prompts: 2 of some 240 tokens) with 8 responses each of at most 64 tokens,
sampled at temperature 1, fp32, one optimizer step, KL (k3) in the loss with weight 0.01. The first step of a process
warms up and is left out; megarlhf's steps include the weight sync, neither side's include evaluation or checkpoints.
Responses end where the model ends them, so a step's tokens vary: tokens/s stands beside samples/s.

TRL generates with Transformers here: its vLLM mode needs a GPU. What is not named above is TRL's default, except that
gradient checkpointing, which would slow it down, is off.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUM_SAMPLES, MAX_TOKENS = 8, 64
BETA, LEARNING_RATE, SEED = 0.01, 1e-6, 1
QUESTIONS = (
    "Why is the sky blue during the day?",
    "How does a bicycle stay upright while it moves?",
    "What should I pack for a week in the mountains?",
    "Write two sentences about a lighthouse in a storm.",
)
_NOTES = (
    "The harbour office keeps three kinds of books. The first lists every ship that came in, with its captain, its "
    "cargo and the day it left again. The second holds the weather of each morning and evening, written by whoever had "
    "the watch, in a few words about wind, cloud and swell. The third is the oldest: it names the boats that the town "
    "built itself, who paid for the timber, and what became of them. Last winter the cellar was flooded and the ink of "
    "some pages ran. Two students now copy what can still be read into a table, one line for a page, and mark each "
    "word that they had to guess. They have finished the ships and half of the weather. The boats are left, because "
    "the handwriting changes four times and nobody is sure about the second hand."
)
LONG_QUESTIONS = (
    f"{_NOTES}\n\nWhich of the three books should the students copy next, and how should they mark what they guess?",
    f"{_NOTES}\n\nWrite a short letter in which the office asks the town for help with the oldest of the three books.",
)
SIDES = ("trl", "megarlhf")

PHASES = ("rollout", "reward", "experience", "train", "sync")

Step = dict[str, float]  # "seconds", "response_tokens", and for megarlhf the seconds of each of PHASES


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str | None]) -> list[float]:
    """Share of vowels in the response: cheap, and different for each response."""
    responses = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    return [sum(letter in "aeiou" for letter in response) / max(1, len(response)) for response in responses]


def run_trl(options: argparse.Namespace, directory: Path) -> list[Step]:
    """`options.steps` + 1 steps of GRPOTrainer in this process, all of them, in order."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    starts: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Wall time of each step, from before the rollout to after the optimizer."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            starts.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return reward_func(texts, [""] * len(texts), [None] * len(texts))

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [q if options.smoke else [{"role": "user", "content": q}] for q in _questions(options)]
    config = GRPOConfig(
        output_dir=str(directory),
        max_steps=options.steps + 1,
        per_device_train_batch_size=options.trl_micro_batch_size,
        gradient_accumulation_steps=_num_responses(options) // options.trl_micro_batch_size,
        num_generations=NUM_SAMPLES,
        max_completion_length=_max_tokens(options),
        temperature=1.0,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    return [
        {"seconds": end - start, "response_tokens": length * _num_responses(options)}
        for start, end, length in zip(starts, ends, lengths, strict=True)
    ]


def run_megarlhf(options: argparse.Namespace, directory: Path) -> list[Step]:
    """`options.steps` + 1 steps of `megarlhf ppo` with GRPO, all of them, in order."""
    data = directory / "prompts.jsonl"
    data.write_text("".join(json.dumps({"input": question}) + "\n" for question in _questions(options)))
    flags = {
        "--pretrain": options.model,
        "--prompt_data": str(data),
        "--reward_function": str(Path(__file__).resolve()),
        "--save": str(directory / "run"),
        "--seed": str(SEED),
        "--actor_num_gpus_per_node": str(options.ranks),
        "--train-iters": str(options.steps + 1),
        "--rollout_batch_size": str(len(_questions(options))),
        "--n_samples_per_prompt": str(NUM_SAMPLES),
        "--global-batch-size": str(_num_responses(options)),
        "--micro-batch-size": str(NUM_SAMPLES),
        "--prompt_max_len": "320" if options.long_prompts else "56",  # of the smoke test's model, all that it knows
        "--generate_max_len": str(_max_tokens(options)),
        "--advantage_estimator": "group_norm",
        "--init_kl_coef": str(BETA),
        "--kl_estimator": "k3",
        "--actor_learning_rate": str(LEARNING_RATE),
        "--vllm_kv_cache_gib": "1",
    }
    switches = ["--use_kl_loss", "--no-normalize_advantages"] + ([] if options.smoke else ["--apply_chat_template"])
    command = [sys.executable, "-m", "megarlhf.cli.train_ppo_ray", *(word for pair in flags.items() for word in pair)]
    subprocess.run([*command, *switches], cwd=ROOT, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "seconds": row["time/step_seconds"] - row.get("time/eval_seconds", 0.0),
            "response_tokens": row["rollout/response_length_mean"] * _num_responses(options),
            **{phase: row[f"time/{phase}_seconds"] for phase in PHASES},
        }
        for row in rows
        if row["step"] > 0
    ]


def _max_tokens(options: argparse.Namespace) -> int:
    return 8 if options.smoke else MAX_TOKENS


def _questions(options: argparse.Namespace) -> tuple[str, ...]:
    return LONG_QUESTIONS if options.long_prompts else QUESTIONS


def _num_responses(options: argparse.Namespace) -> int:
    return len(_questions(options)) * NUM_SAMPLES


def run_side(side: str, options: argparse.Namespace) -> list[Step]:
    """A side in a fresh process on the first `options.threads` cores; its steps without the warm-up."""
    command = [sys.executable, __file__, "--side", side, "--model", str(options.model), "--steps", str(options.steps)]
    command += ["--threads", str(options.threads), "--ranks", str(options.ranks)]
    command += ["--trl_micro_batch_size", str(options.trl_micro_batch_size)] + ["--smoke"] * options.smoke
    command += ["--long_prompts"] * options.long_prompts
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    steps: list[Step] = json.loads(done.stdout.splitlines()[-1])
    return steps[1:]


def compare(options: argparse.Namespace) -> None:
    """Sides in turns, then the table."""
    steps: dict[str, list[Step]] = {side: [] for side in SIDES}
    for round_number in range(1, options.rounds + 1):
        for side in SIDES:
            measured = run_side(side, options)
            steps[side] += measured
            listed = ", ".join(f"{step['seconds']:.1f}" for step in measured)
            print(f"round {round_number}, {side}: {listed} s", flush=True)
    print(f"\n{'side':<10}{'steps':>6}{'median s/step':>15}{'samples/s':>11}{'tokens/step':>13}{'tokens/s':>10}")
    rates = {}
    for side in SIDES:
        seconds = sum(step["seconds"] for step in steps[side])
        tokens = sum(step["response_tokens"] for step in steps[side])
        rates[side] = (len(steps[side]) * _num_responses(options) / seconds, tokens / seconds)
        middle = median(step["seconds"] for step in steps[side])
        print(
            f"{side:<10}{len(steps[side]):>6}{middle:>15.1f}{rates[side][0]:>11.2f}"
            f"{tokens / len(steps[side]):>13.0f}{rates[side][1]:>10.1f}"
        )
    samples, tokens = (ours / theirs for ours, theirs in zip(rates["megarlhf"], rates["trl"], strict=True))
    ours = steps["megarlhf"]
    parts = ", ".join(f"{phase} {sum(step[phase] for step in ours) / len(ours):.1f}" for phase in PHASES)
    print(f"\nseconds of a step of megarlhf: {parts}")
    print(f"megarlhf / TRL: {samples:.2f} x samples/s, {tokens:.2f} x response tokens/s")


def main() -> None:
    """Compare, or run one side and print its steps as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face checkpoint with a chat template, such as SmolLM2")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--ranks", type=int, default=1, help="megarlhf's data-parallel ranks, which divide the cores")
    parser.add_argument("--trl_micro_batch_size", type=int, default=8, help="TRL's per_device_train_batch_size")
    parser.add_argument(
        "--long_prompts", action="store_true", help="2 prompts of some 240 tokens instead of 4 short ones"
    )
    parser.add_argument("--smoke", action="store_true", help="one step of a tiny model; the times mean nothing")
    parser.add_argument("--side", choices=SIDES, help="run only this side, in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grpo_vs_trl_") as name:
        directory = Path(name)
        if options.smoke and options.side is None:
            options.steps, options.rounds, options.model = 1, 1, str(directory / "model")
            assets = ROOT / "examples" / "demo" / "make_assets.py"
            subprocess.run([sys.executable, str(assets), name, "--seed", "1"], check=True)
        if options.model is None:
            parser.error("--model is needed: python examples/smollm2.py models/smollm2 writes one")
        if options.side is None:
            compare(options)
        else:
            run = run_trl if options.side == "trl" else run_megarlhf
            print(json.dumps(run(options, directory)))


if __name__ == "__main__":
    main()
