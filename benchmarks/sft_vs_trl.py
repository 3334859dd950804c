"""Non-padding tokens a second of supervised fine-tuning on CPU cores: megarlhf against TRL's SFTTrainer.

    python examples/smollm2.py models/smollm2
    python benchmarks/sft_vs_trl.py --model models/smollm2           # about 10 minutes
    python benchmarks/sft_vs_trl.py --smoke                          # one tiny step of each side, for CI

Sides take turns, each in a process of its own on the same cores: TRL as it is, TRL with its packing, megarlhf. All
train on the same questions and answers of long-tailed lengths, at most --max_len tokens, fp32, 16 of them a step (with
TRL's packing as many tokens), loss on the answers. The first step of a process is left out, and padding counts for
nobody. Then the share of the machine's matrix products that a step of megarlhf reaches: 6 * parameters * tokens
operations, against products of the model's sizes.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.sides import Step, main, num_parameters, run_ours, step_clock, text

BATCH, MICRO, LEARNING_RATE = 16, 8, 1e-5


def pairs(options: argparse.Namespace) -> list[dict[str, str]]:
    """Questions and answers, enough for every step."""
    draw = random.Random(3)
    return [
        {"prompt": text(draw, options.words) + " ", "completion": text(draw, options.words)}
        for _ in range(BATCH * (options.steps + 1))
    ]


def run_trl(options: argparse.Namespace, directory: Path, *, packed: bool) -> list[Step]:
    """Steps of SFTTrainer in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(options.threads)
    clock, seconds = step_clock()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = pairs(options)
    lengths = [len(ids) for ids in tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]]
    mean = sum(lengths) / len(lengths)
    config = SFTConfig(
        output_dir=str(directory),
        max_steps=options.steps + 1,
        per_device_train_batch_size=1 if packed else MICRO,
        gradient_accumulation_steps=max(1, round(BATCH * mean / options.max_len)) if packed else BATCH // MICRO,
        max_length=options.max_len,
        packing=packed,
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
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    totals = [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row][: len(seconds)]
    return [
        {"seconds": one, "tokens": after - before}
        for one, before, after in zip(seconds, [0.0, *totals], totals, strict=False)
    ]


def run_megarlhf(options: argparse.Namespace, directory: Path) -> list[Step]:
    """Steps of `megarlhf sft`."""
    data = directory / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs(options)))
    flags = {
        "--pretrain": options.model,
        "--dataset": str(data),
        "--input_key": "prompt",
        "--output_key": "completion",
        "--train-iters": str(options.steps + 1),
        "--global-batch-size": str(BATCH),
        "--max_tokens_per_micro_batch": str(MICRO * options.max_len // 2),
        "--max_len": str(options.max_len),
        "--learning_rate": str(LEARNING_RATE),
    }
    rows = run_ours("train_sft", flags, [], directory / "run")
    tokens = [row["perf/tokens_per_second"] * row["time/step_seconds"] for row in rows]
    each = 6 * num_parameters(options.model)
    return [
        {"seconds": row["time/train_seconds"], "tokens": count, "operations": each * count}
        for row, count in zip(rows, tokens, strict=True)
    ]


if __name__ == "__main__":
    main(
        __file__,
        __doc__,
        {
            "TRL": partial(run_trl, packed=False),
            "TRL packed": partial(run_trl, packed=True),
            "megarlhf": run_megarlhf,
        },
    )
