"""Pairs of DPO on CPU cores: megarlhf against TRL's DPOTrainer, in tokens of the pairs' rows a second.

    python examples/smollm2.py models/smollm2
    python benchmarks/dpo_vs_trl.py --model models/smollm2           # about 10 minutes
    python benchmarks/dpo_vs_trl.py --smoke                          # one tiny step of each side, for CI

Sides take turns, each in a process of its own on the same cores. Both train on the same 8 pairs a step: a question and
two answers of long-tailed lengths, each at most half as long as the question, fp32, the reference beside the model. A
pair's tokens are its question twice and both answers: megarlhf computes the question once, TRL twice, and padding
counts for nobody. The first step of a process is left out.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.sides import Step, main, num_parameters, run_ours, step_clock, text

BATCH, MICRO, LEARNING_RATE = 8, 4, 1e-6


def preferences(options: argparse.Namespace) -> list[dict[str, str]]:
    """Pairs, enough for every step."""
    draw, answer = random.Random(3), max(1, options.words // 2)
    return [
        {
            "prompt": text(draw, options.words) + " ",
            "chosen": text(draw, answer),
            "rejected": text(draw, answer) + " no",
        }
        for _ in range(BATCH * (options.steps + 1))
    ]


def run_trl(options: argparse.Namespace, directory: Path) -> list[Step]:
    """Steps of DPOTrainer in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(options.threads)
    clock, seconds = step_clock()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = preferences(options)
    config = DPOConfig(
        output_dir=str(directory),
        max_steps=options.steps + 1,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        max_length=options.max_len,
        learning_rate=LEARNING_RATE,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    texts = [row["prompt"] + row[answer] for row in rows for answer in ("chosen", "rejected")]
    mean = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"]) / len(rows)  # each ends with an EOS
    return [{"seconds": one, "tokens": BATCH * mean} for one in seconds]


def run_megarlhf(options: argparse.Namespace, directory: Path) -> list[Step]:
    """Steps of `megarlhf dpo`."""
    from transformers import AutoTokenizer

    data, pairs = directory / "pairs.jsonl", preferences(options)
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    once, answers = (
        sum(len(tokenizer(pair[key])["input_ids"]) for pair in pairs for key in keys)
        for keys in (("prompt",), ("chosen", "rejected"))
    )
    flags = {
        "--pretrain": options.model,
        "--dataset": str(data),
        "--prompt_key": "prompt",
        "--train-iters": str(options.steps + 1),
        "--global-batch-size": str(BATCH),
        "--max_tokens_per_micro_batch": str(MICRO * options.max_len),
        "--max_len": str(options.max_len),
        "--learning_rate": str(LEARNING_RATE),
    }
    rows = run_ours("train_dpo", flags, [], directory / "run")
    tokens = [row["perf/tokens_per_second"] * row["time/step_seconds"] for row in rows]
    # forward and backward passes, and the reference's forward pass, of each token that is computed
    each = 8 * num_parameters(options.model) * (once + answers) / (2 * once + answers)
    return [
        {"seconds": row["time/train_seconds"], "tokens": count, "operations": each * count}
        for row, count in zip(rows, tokens, strict=True)
    ]


if __name__ == "__main__":
    main(__file__, __doc__, {"TRL": run_trl, "megarlhf": run_megarlhf})
