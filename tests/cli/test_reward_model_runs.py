"""Runs of reward models and process reward models on two ranks, started as a user does."""

import json
import random
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardTrainer

from megarlhf.cli.main import main
from tests.cluster.runs import metrics, run

Flags = dict[str, str | None]
TOKENS = {"good": "y", "bad": "n", "end of step": "z"}


def steps(seed: int, count: int) -> list[dict[str, object]]:
    """Steps of one digit each, of which the even ones are good; every fourth row says so as a probability."""
    generator = random.Random(seed)
    rows: list[dict[str, object]] = []
    for number in range(count):
        digits = [generator.randrange(10) for _ in range(1 + number % 3)]
        soft = number % 4 == 0
        labels = [(1 - d % 2) * 0.9 + 0.05 if soft else TOKENS["bad" if d % 2 else "good"] for d in digits]
        rows.append({"input": "".join(f"{d}{TOKENS['end of step']}" for d in digits), "label": labels})
    return rows


@pytest.fixture
def flags(assets: Path, tmp_path: Path) -> Flags:
    return {
        "--pretrain": str(assets / "model"),
        "--dataset": str(tmp_path / "train.jsonl"),
        "--eval_dataset": str(tmp_path / "eval.jsonl"),
        "--max_len": "16",
        "--global-batch-size": "16",
        "--train-iters": "15",
        "--lr_warmup_ratio": "0",
        "--num_gpus_per_node": "2",
        "--save": str(tmp_path / "run"),
    }


def preferences(seed: int, count: int) -> list[dict[str, object]]:
    """A digit is to be answered by digits of its own parity; the answers differ in length."""
    generator = random.Random(seed)
    rows: list[dict[str, object]] = []
    for number in range(count):
        asked, sizes = generator.randrange(10), generator.choices((1, 2, 3), k=2)
        good, bad = (
            "".join(str(2 * generator.randrange(5) + (asked + odd) % 2) for _ in range(sizes[odd])) for odd in (0, 1)
        )
        rows.append({"prompt": f"{asked}=", "chosen": good, "rejected": bad, "margin": number % 3 / 2})
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_process_reward_model_learns_and_is_a_causal_model(flags: Flags, tmp_path: Path) -> None:
    held_out = steps(1, 24)
    write(tmp_path / "train.jsonl", steps(0, 64))
    write(tmp_path / "eval.jsonl", held_out)
    own = {"--placeholder_token": TOKENS["end of step"], "--reward_tokens": f"[{TOKENS['good']}, {TOKENS['bad']}]"}
    run("train_prm", flags | own | {"--learning_rate": "5e-3", "--tensor-model-parallel-size": "2"})
    rows = metrics(tmp_path / "run")
    assert rows[15]["prm/loss"] < rows[1]["prm/loss"] and rows[15]["prm/accuracy"] > 0.9

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in TOKENS.items()}
    losses, right = list[float](), list[bool]()
    for row in held_out:
        tokens = tokenizer(row["input"])["input_ids"]
        tokens = tokens[: max(i for i, t in enumerate(tokens) if t == ids["end of step"]) + 1]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        judged = logits[torch.tensor(tokens) == ids["end of step"]][:, [ids["good"], ids["bad"]]].log_softmax(-1)
        labels = row["label"]
        assert isinstance(labels, list) and len(labels) == len(judged)
        for (good, bad), label in zip(judged.tolist(), labels, strict=True):
            share = label if isinstance(label, float) else float(label == TOKENS["good"])
            losses.append(-share * good - (1 - share) * bad)
            right.append((good > bad) == (share > 0.5))
    assert rows[15]["prm/eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert rows[15]["prm/eval_accuracy"] == pytest.approx(sum(right) / len(right)) and sum(right) > 0.9 * len(right)


@pytest.mark.slow
def test_labels_that_do_not_match_are_told_with_their_row(flags: Flags, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"input": "1z", "label": ["y"]}, {"input": "1z2z", "label": ["y"]}])
    write(tmp_path / "eval.jsonl", [{"input": "1z", "label": ["y"]}])
    said = run("train_prm", flags | {"--placeholder_token": "z"}, expect=2)
    assert said.count("error:") == 1 and "Traceback" not in said
    assert f"row 1 (line 2) of {tmp_path}/train.jsonl: label_key=label has 1 labels, and the text 2 tokens" in said


def pads_with_eos(assets: Path, directory: Path) -> Path:
    """The model with a tokenizer that pads with EOS, as many do."""
    shutil.copytree(assets / "model", directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.eos_token_id}))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_reward_model_is_a_classifier_of_the_same_rewards(
    flags: Flags, assets: Path, tmp_path: Path, layout: str
) -> None:
    """With evaluation data and margins, and without both."""
    rows, held_out, evaluates = preferences(0, 64), preferences(1, 24), layout == "tensor"
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "eval.jsonl", held_out)
    own = {"--pretrain": str(pads_with_eos(assets, tmp_path / "model")), "--prompt_key": "prompt"}
    own |= {f"--{layout}-model-parallel-size": "2", "--learning_rate": "3e-3", "--train-iters": "20"}
    own |= {"--loss": "logexp", "--compute_fp32_loss": None, "--margin_loss": None} if evaluates else {}
    run("train_rm", {k: v for k, v in (flags | own).items() if evaluates or k != "--eval_dataset"})
    logged, directory = metrics(tmp_path / "run"), tmp_path / "run" / "hf"
    assert logged[20]["rm/loss"] < logged[1]["rm/loss"] and logged[20]["rm/accuracy"] > 0.9

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer, config = AutoTokenizer.from_pretrained(directory), json.loads((directory / "config.json").read_text())
    assert model.config.num_labels == 1 and config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    judged = held_out if evaluates else rows
    texts = [f"{row['prompt']}{row[key]}{tokenizer.eos_token}" for key in ("chosen", "rejected") for row in judged]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    inputs["margin"] = torch.tensor([row["margin"] if evaluates else 0.0 for row in judged])
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )

    def without_margin(margin: torch.Tensor, **given: torch.Tensor) -> object:
        return model(**given)

    with torch.no_grad():
        loss, outputs = RewardTrainer.compute_loss(trainer, without_margin, inputs, True)
    rewards = outputs.logits[:, 0].double()
    assert config["mean"] == pytest.approx(rewards.mean().item(), abs=1e-5)
    assert config["std"] == pytest.approx(rewards.std(correction=0).item(), abs=1e-5)
    if evaluates:
        chosen, rejected = rewards.chunk(2)
        found = {name.removeprefix("rm/eval_"): value for name, value in logged[20].items() if "eval_" in name}
        assert found["loss"] == pytest.approx(loss.item(), abs=1e-5), "TRL's loss"
        assert found["chosen_reward"] == pytest.approx(chosen.mean().item(), abs=1e-5)
        assert found["rejected_reward"] == pytest.approx(rejected.mean().item(), abs=1e-5)
        assert found["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
        assert found["accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    converted = tmp_path / "converted"
    assert main(["convert", "megatron-to-hf", "--load", str(tmp_path / "run"), "--save", str(converted)]) == 0
    assert (converted / "config.json").read_text() == (directory / "config.json").read_text()
