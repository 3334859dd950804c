"""`megarlhf parity` as a user runs it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megarlhf.cli import parity, run_parity
from megarlhf.config.arguments import ModelArguments
from megarlhf.config.supervised_arguments import ParityArguments, ParityConfig
from tests.cluster.runs import run
from tests.tiny_models import make_model


@pytest.mark.slow
def test_a_layout_within_and_past_its_tolerance(tmp_path: Path) -> None:
    flags = {"--pretrain": str(make_model(tmp_path / "model", family="qwen2", tied=True)), "--longest": "12"}
    flags |= {"--tensor-model-parallel-size": "2", "--num_gpus_per_node": "2"}
    output = run("parity", flags)
    assert output.count("ok") == 3 * 10 and "PAST" not in output
    for name in ("sft", "actor", "critic"):
        assert f"\n{name}: largest gradient" in output
    output = run("parity", flags | {"--bf16": None, "--objectives": "actor"})
    assert output.count("ok") == 10 and "forward     0.0" not in output, "in bfloat16 it is off, as one process is"
    output = run("parity", flags | {"--tolerance": "1e-9", "--objectives": "actor"}, expect=1)
    assert "forward" in output and "PAST ITS TOLERANCE" in output


def test_mistakes_are_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(make_model(tmp_path / "model", family="llama"))
    flags = ["--pretrain", model, "--tensor-model-parallel-size", "3", "--num_gpus_per_node", "2", "--longest", "0"]
    assert parity.main(flags) == 2
    said = capsys.readouterr().err
    assert "tensor_model_parallel_size=3 does not divide num_attention_heads=4" in said
    assert "num_gpus_per_node=2 makes 2 ranks" in said and "longest=0 must be at least 3" in said


def test_a_step_that_is_not_taken_is_past_every_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However far off one process in bfloat16 is, and whatever --tolerance says."""
    save_file({"w": torch.tensor([0.5])}, tmp_path / "gradients.safetensors")
    save_file({"forward": torch.zeros(1), "after": torch.ones(1)}, tmp_path / "tokens.safetensors")
    (tmp_path / "numbers.json").write_text('{"loss": 1.0, "metrics": {}, "grad norm": 1.0}')
    (tmp_path / "bf16.json").write_text('{"training": 0.5, "loss": 0.1, "metrics": 0.1, "movement": 0.4}')
    config = ParityConfig(
        model=ModelArguments(pretrain="model", bf16=True), parity=ParityArguments(num_gpus_per_node=2, tolerance=9.0)
    )
    assert not run_parity._report(config, "sft", {"movement": 1.0}, tmp_path)
    assert run_parity._report(config, "sft", {"movement": 0.49}, tmp_path)
    assert "PAST ITS TOLERANCE" in capsys.readouterr().out
