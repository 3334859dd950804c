"""Runs whose frozen weights are in 4 bits, started as a user does, and what is refused of them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.demo.make_assets import make_tokenizer
from megarlhf.cli import train_sft
from tests.cluster.runs import metrics, run
from tests.tiny_models import make_model

Flags = dict[str, str | None]


@pytest.fixture
def flags(tmp_path: Path) -> Flags:
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "intermediate_size": 192, "num_hidden_layers": 2}
    model = make_model(tmp_path / "model", **sizes)
    tokenizer.save_pretrained(model)
    rows = [{"input": f"{i}=", "output": str(i % 7)} for i in range(12)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **{"--pretrain": str(model), "--dataset": str(tmp_path / "sft.jsonl"), "--output_key": "output"},
        **{"--max_len": "16", "--global-batch-size": "4", "--learning_rate": "1e-2", "--lr_scheduler": "constant"},
        **{"--lora_rank": "4", "--load_in_4bit": None, "--save": str(tmp_path / "run")},
    }


def said_at_set_up(flags: Flags, capsys: pytest.CaptureFixture[str], *, expect: int = 2) -> str:
    words = [word for flag, value in flags.items() for word in ([flag] if value is None else [flag, value])]
    assert train_sft.main([*words, "--dry-run"]) == expect
    captured = capsys.readouterr()
    return captured.out if expect == 0 else captured.err


def test_what_cannot_be_is_refused(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_at_set_up(flags | {"--lora_rank": "0"}, capsys)
    assert "load_in_4bit=True is ignored with lora_rank=0" in said
    said = said_at_set_up(flags | {"--tensor-model-parallel-size": "2", "--num_gpus_per_node": "2"}, capsys)
    assert "load_in_4bit=True; down_proj has 192 inputs on 2 rank(s) (64 numbers" in said and "o_proj" not in said


def test_the_plan_counts_4_bits(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    whole = dict(flags)
    del whole["--load_in_4bit"]
    plans = [said_at_set_up(given, capsys, expect=0).splitlines() for given in (flags, whole)]
    lines = [next(line for line in plan if line.startswith("actor  parameters")) for plan in plans]
    in_4_bits, in_32 = (float(line.split()[2]) for line in lines)
    assert in_4_bits < 0.5 * in_32


@pytest.mark.slow
def test_a_stopped_run_goes_on_in_another_layout(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train_sft", flags | {"--train_iters": "6", "--save": str(tmp_path / "whole")})
    run("train_sft", flags | {"--train_iters": "3"})
    more = {"--train_iters": "6", "--load": str(tmp_path / "run")}
    run("train_sft", flags | more | {"--num_gpus_per_node": "2", "--pipeline-model-parallel-size": "2"})
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert whole[6]["sft/loss"] < 0.8 * whole[1]["sft/loss"]
    for step, row in whole.items():
        assert parts[step]["sft/loss"] == pytest.approx(row["sft/loss"], abs=1e-4)
    exported = [load_file(tmp_path / name / "hf" / "adapter_model.safetensors") for name in ("whole", "run")]
    assert exported[0].keys() == exported[1].keys()
    for name, tensor in exported[0].items():
        assert (tensor - exported[1][name]).abs().max() < 1e-3, name
    del flags["--load_in_4bit"]
    assert "lora" in said_at_set_up(flags | more, capsys)  # these adapters are of other weights
