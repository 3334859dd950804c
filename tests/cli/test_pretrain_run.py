"""Continued pre-training on a blend of indexed data, by ranks, stopped and continued, as a user starts it."""

import json
from pathlib import Path

import pytest

from megarlhf.cli.main import main
from tests.cluster.runs import Run, command, metrics

Flags = dict[str, str | None]


@pytest.fixture
def flags(assets: Path, tmp_path: Path) -> Flags:
    for name, step in (("a", 1), ("b", 3)):
        rows = [{"text": " ".join(str((i + step * k) % 10) for k in range(12))} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["--input", str(tmp_path / f"{name}.jsonl"), "--output-prefix", str(tmp_path / name), "--append-eod"]
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(assets / "model")]
        assert main(["preprocess", *words, "--workers", "1"]) == 0
    return {
        "--pretrain": str(assets / "model"),
        "--pretrain-mode": None,
        "--split": "8,1,1",
        "--seq-length": "16",
        "--global-batch-size": "8",
        "--micro-batch-size": "2",
        "--learning-rate": "1e-2",
        "--lr-decay-style": "constant",
        "--eval-iters": "1",
    }


def pretrain(flags: Flags, tmp_path: Path, save: str, more: Flags) -> dict[int, dict[str, float]]:
    """A run of a blend, to its end; its metrics."""
    blend = ["0.75", str(tmp_path / "a_text_document"), "0.25", str(tmp_path / "b_text_document")]
    process = Run([*command("train_sft", flags | more | {"--save": str(tmp_path / save)}), "--data-path", *blend])
    process.wait(timeout=600)
    assert process.returncode == 0, process.read()
    assert "of the 142 units of an epoch" in process.read()
    return metrics(tmp_path / save)


@pytest.mark.slow
def test_ranks_learn_and_a_stopped_run_goes_on_as_if_it_had_not(flags: Flags, tmp_path: Path) -> None:
    """Two ranks run past the epoch's end; one rank stops in it, and is continued over it."""
    whole = pretrain(flags, tmp_path, "whole", {"--train-iters": "20", "--num-gpus-per-node": "2"})
    assert whole[20]["sft/loss"] < 0.8 * whole[1]["sft/loss"] and whole[20]["data/epoch"] > 1
    pretrain(flags, tmp_path, "parts", {"--train-iters": "5"})
    parts = pretrain(flags, tmp_path, "parts", {"--train-iters": "20", "--load": str(tmp_path / "parts")})
    for name, last in (("sft/loss", range(1, 21)), ("sft/eval_loss", (20,))):
        expected = [whole[step][name] for step in last]
        assert [parts[step][name] for step in last] == pytest.approx(expected, abs=1e-3)
