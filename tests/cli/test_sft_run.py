"""Supervised runs of two ranks, started as a user does."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megarlhf.cli.disk import checkpoint_bytes
from megarlhf.cli.main import main
from megarlhf.data.tokenizer import load_tokenizer
from tests.cluster.runs import Run, command, metrics, run, start

Flags = dict[str, str | None]


@pytest.fixture
def flags(assets: Path, tmp_path: Path) -> Flags:
    rows = [{"input": f"{i}=", "output": str(i % 7)} for i in range(10)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text(json.dumps(rows[0]) + "\n")  # fewer rows than ranks
    return {
        "--pretrain": str(assets / "model"),
        "--dataset": str(tmp_path / "sft.jsonl"),
        "--eval_dataset": str(tmp_path / "eval.jsonl"),
        "--input_key": "input",
        "--output_key": "output",
        "--max_len": "16",
        "--global-batch-size": "4",
        "--learning_rate": "1e-2",
        "--num_gpus_per_node": "2",
        "--save": str(tmp_path / "run"),
    }


TEMPLATE = "{% for m in messages %}{{ m['content'] }}=={% endfor %}"


def other_tokenizer(assets: Path, directory: Path) -> Path:
    """The model's tokenizer with one file more, of which only the content tells whose it is."""
    shutil.copytree(assets / "model", directory, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(assets / "model" / "tokenizer_config.json", directory)
    (directory / "vocabulary.tiktoken").write_text("trained with this")
    return directory


def test_two_ranks_learn_evaluate_and_export(flags: Flags, assets: Path, tmp_path: Path) -> None:
    tokenizer = other_tokenizer(assets, tmp_path / "tokenizer")
    own = {"--tokenizer": str(tokenizer), "--apply_chat_template": None, "--tokenizer_chat_template": TEMPLATE}
    overlap = {"--train-iters": "6", "--overlap-grad-reduce": None, "--overlap-param-gather": None}
    run("train_sft", flags | overlap | own)
    rows = metrics(tmp_path / "run")
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    assert rows[6]["sft/loss"] < rows[1]["sft/loss"] and "sft/eval_loss" in rows[6]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    (saved,) = (tmp_path / "run" / "checkpoints").glob("iter_*")
    size = sum(path.stat().st_size for path in saved.rglob("*.distcp"))
    counted = checkpoint_bytes(sum(p.numel() for p in model.parameters()), bf16=False, distributed=True)
    assert counted <= size <= 1.3 * counted, "what the disk is asked for is what a checkpoint takes"
    assert all(torch.isfinite(p).all() for p in model.parameters())
    converted = tmp_path / "converted"
    assert main(["convert", "megatron-to-hf", "--load", str(tmp_path / "run"), "--save", str(converted)]) == 0
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    trained = load_tokenizer(str(tokenizer), chat_template=TEMPLATE)
    for directory in (tmp_path / "run" / "hf", converted):
        assert (directory / "vocabulary.tiktoken").read_text() == "trained with this"
        exported = AutoTokenizer.from_pretrained(directory)
        for tokenize in (False, True):
            found = exported.apply_chat_template(messages, tokenize=tokenize)
            assert found == trained.apply_chat_template(messages, tokenize=tokenize)
    assert (converted / "config.json").read_text() == (tmp_path / "run" / "hf" / "config.json").read_text()


COUNT_READING = """
import os, sys
if "megarlhf.cli.train_sft" in sys.orig_argv:
    from megarlhf.data import sft
    load = sft.load_sft_rows
    def counted(options, **more):
        with open(os.environ["READINGS"], "a") as file:
            file.write(os.environ.get("RANK", "parent") + " " + os.path.basename(str(options.source)) + chr(10))
        return load(options, **more)
    sft.load_sft_rows = counted
"""


@pytest.mark.slow
def test_data_is_tokenized_once_on_a_machine(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parent, or by torchrun's rank 0; the ranks train on the same rows both times, and nothing stays behind."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(COUNT_READING)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "python"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    losses = []
    for start_of_run, reader in (
        (None, "parent"),
        (["torch.distributed.run", "--standalone", "--nproc-per-node=2"], 0),
    ):
        readings = tmp_path / f"readings by {reader}"
        monkeypatch.setenv("READINGS", str(readings))
        own = flags | {"--train-iters": "3", "--save": str(tmp_path / f"run of {reader}")}
        words = command("train_sft", own)
        if start_of_run is not None:
            words[1:2] = ["-m", *start_of_run, "-m"]
        process = Run(words)
        assert process.wait(timeout=600) == 0, process.read()
        assert "not writable" not in process.read()
        assert readings.read_text().splitlines() == [f"{reader} sft.jsonl", f"{reader} eval.jsonl"]
        rows = metrics(tmp_path / f"run of {reader}")
        losses.append([rows[step]["sft/loss"] for step in (1, 2, 3)] + [rows[3]["sft/eval_loss"]])
        assert not list((tmp_path / "temporary").glob("megarlhf-*"))
    assert losses[0] == losses[1]


def test_mistakes_are_told_once_before_any_rank_starts(flags: Flags, assets: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(assets / "model", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    said = run("train_sft", flags | {"--train-iters": "1", "--max_len": "1", "--pretrain": str(cut)}, expect=2)
    assert said.count("error:") == 1 and "max_len=1" in said and "Traceback" not in said
    assert said.count("not a whole safetensors file") == 1


@pytest.mark.slow
def test_sigterm_finishes_the_step_and_saves(flags: Flags, tmp_path: Path) -> None:
    process = start("train_sft", flags | {"--train-iters": "100000"})
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(timeout=60)
    assert process.returncode == 0, process.read()
    last = max(metrics(tmp_path / "run"))
    pointer = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert int(pointer.read_text()) == last < 100000


@pytest.mark.slow
def test_adapters_train_and_go_on_in_another_layout(flags: Flags, assets: Path, tmp_path: Path) -> None:
    """What is exported is the model that was evaluated, by PEFT."""
    lora = {"--lora_rank": "4", "--target_modules": "down_proj", "--tensor-model-parallel-size": "2"}
    own = flags | {"--train-iters": "6", "--save_interval": "3"}
    run("train_sft", own | lora)
    rows = metrics(tmp_path / "run")
    assert rows[6]["sft/loss"] < rows[1]["sft/loss"] - 0.1
    base = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(assets / "model")("0=0</s>")["input_ids"]])
    labels = ids.where(torch.arange(ids.shape[1]) > 1, -100)  # behind the prompt
    with torch.no_grad():
        untrained = base(ids, labels=labels).loss.item()
        model = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "hf")
        assert model(ids, labels=labels).loss.item() == pytest.approx(rows[6]["sft/eval_loss"], abs=1e-5)
    assert rows[6]["sft/eval_loss"] < untrained - 0.1
    assert model.peft_config["default"].target_modules == {"down_proj"}
    parts = shutil.copytree(tmp_path / "run", tmp_path / "parts")
    (parts / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    other = {"--tensor-model-parallel-size": "1", "--pipeline-model-parallel-size": "2"}
    run("train_sft", own | lora | other | {"--save": str(parts), "--load": str(parts)})
    resumed = metrics(parts)
    for step in (4, 5, 6):
        assert resumed[step]["sft/loss"] == pytest.approx(rows[step]["sft/loss"], rel=1e-4)
    assert resumed[6]["sft/eval_loss"] == pytest.approx(rows[6]["sft/eval_loss"], rel=1e-4)
