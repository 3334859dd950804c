"""PPO with averaged weights, an exported critic, a pretraining loss, dynamic sampling. Whole runs, so slow."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megarlhf.cli.main import main
from tests.cluster.runs import SMALL, metrics, run, write_inputs
from tests.cluster.test_resume_and_faults import numbers

pytestmark = pytest.mark.slow
DECAY, STEPS = 0.6, 4


@pytest.fixture(scope="module")
def flags(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Two data-parallel ranks of actor and critic, one optimizer step a step, a checkpoint after each."""
    inputs = tmp_path_factory.mktemp("inputs")
    given = SMALL | write_inputs(inputs) | {"--pretrain": str(assets / "model"), "--actor_num_gpus_per_node": "2"}
    rows = [{"input": f"{number}={number * 7}"} for number in range(23)]
    (inputs / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given |= {"--pretrain_data": str(inputs / "documents.jsonl"), "--ptx_coef": "0.5"}
    given |= {"--enable_ema": None, "--ema_decay": str(DECAY), "--save_value_network": None}
    return given | {"--global-batch-size": "16", "--train-iters": str(STEPS), "--save-interval": "1"}


@pytest.fixture(scope="module")
def finished(flags: dict[str, str | None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("whole") / "run"
    run("train_ppo", flags | {"--save": str(save), "--max_ckpt_num": "9"})
    return save


def converted(run: Path, step: int, target: Path) -> dict[str, torch.Tensor]:
    """The actor's weights after a step, from its checkpoint."""
    load = str(run / "checkpoints" / f"iter_{step:07d}" / "actor")
    assert main(["convert", "megatron-to-hf", "--load", load, "--save", str(target)]) == 0
    return load_file(target / "model.safetensors")


def test_average_is_a_float64_recurrence_over_the_steps(finished: Path, assets: Path, tmp_path: Path) -> None:
    average = {name: weight.double() for name, weight in load_file(assets / "model" / "model.safetensors").items()}
    for step in range(1, STEPS + 1):
        weights = converted(finished, step, tmp_path / str(step))
        average = {name: DECAY * before + (1 - DECAY) * weights[name].double() for name, before in average.items()}
    found, last = (load_file(finished / name / "model.safetensors") for name in ("hf_ema", "hf"))
    assert found.keys() == average.keys()
    for name, expected in average.items():
        torch.testing.assert_close(found[name].double(), expected, atol=1e-7, rtol=1e-6)
        assert not torch.equal(found[name], last[name])
    AutoModelForCausalLM.from_pretrained(finished / "hf_ema")


def test_critic_is_a_sequence_classifier(finished: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(finished / "hf_critic", dtype=torch.float32)
    assert model.num_labels == 1 and float(model.score.weight.abs().max()) > 0
    policy = AutoModelForCausalLM.from_pretrained(finished / "hf", dtype=torch.float32)
    pairs = zip(model.model.parameters(), policy.model.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs if a.dim() > 1), "it was trained on its own"
    value = model(torch.tensor([[3, 4, 5]])).logits
    assert value.shape == (1, 1) and bool(value.isfinite())


def test_pretraining_loss_falls_and_its_data_is_gone(finished: Path) -> None:
    rows = metrics(finished)
    losses = [rows[step]["policy/ptx_loss"] for step in range(1, STEPS + 1)]
    assert losses[-1] < losses[0] - 0.05
    assert not (finished / "pretrain_data").exists()


def test_a_resumed_run_is_the_uninterrupted_one(finished: Path, flags: dict[str, str | None], tmp_path: Path) -> None:
    """Documents, average and critic go on where they were."""
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken)
    (broken / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    for name in ("hf", "hf_ema", "hf_critic"):
        shutil.rmtree(broken / name)
    run("train_ppo", flags | {"--save": str(broken), "--load": str(broken), "--max_ckpt_num": "9"})
    expected, found = metrics(finished), metrics(broken)
    for step in (3, 4):
        assert numbers(found[step]) == numbers(expected[step])
    for name in ("hf", "hf_ema", "hf_critic"):
        first, second = (load_file(save / name / "model.safetensors") for save in (finished, broken))
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_adapters_are_averaged(flags: dict[str, str | None], tmp_path: Path) -> None:
    lora = {"--lora_rank": "4", "--train-iters": "2", "--save": str(tmp_path / "run"), "--ema_decay": "0"}
    run("train_ppo", flags | lora)
    last, average = (load_file(tmp_path / "run" / name / "adapter_model.safetensors") for name in ("hf", "hf_ema"))
    assert last.keys() == average.keys() and all(torch.equal(last[name], average[name]) for name in last)
    assert max(float(weight.abs().max()) for name, weight in average.items() if "lora_B" in name) > 0
    assert (tmp_path / "run" / "hf_critic" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def filtering(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Without a critic; responses of one token, so that many prompts have two of one reward; a checkpoint a step."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    given = SMALL | inputs | {"--pretrain": str(assets / "model"), "--advantage_estimator": "rloo"}
    given |= {"--generate_max_len": "2", "--dynamic_filtering": None, "--dynamic_filtering_max_rounds": "4"}
    given |= {"--overlong_buffer_len": "2", "--overlong_penalty_factor": "0.25", "--init_kl_coef": "0"}
    return given | {"--train-iters": "5", "--save-interval": "1", "--max_ckpt_num": "9"}


def test_dynamic_sampling_goes_on_where_it_was(filtering: dict[str, str | None], tmp_path: Path) -> None:
    """Steps draw different numbers of prompts; a run that is continued equals the uninterrupted one bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("train_ppo", filtering | {"--save": str(whole)})
    states = [json.loads(file.read_text()) for file in sorted(whole.glob("checkpoints/*/run_state.json"))]
    consumed = [0, *(state["consumed_prompts"] for state in states)]
    steps = [after - before for before, after in zip(consumed[:-1], consumed[1:], strict=True)]
    assert max(steps) > 8 and len(set(steps)) > 1, steps
    expected = metrics(whole)
    assert any(expected[step]["rollout/filter_rounds"] > 1 for step in range(1, 6))
    for step, number in enumerate(steps, 1):
        left = expected[step]["rollout/filtered_groups"] + expected[step]["rollout/surplus_groups"]
        assert left == number - 8 or expected[step]["rollout/filter_rounds"] == 4
    shutil.copytree(whole, broken)
    (broken / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    run("train_ppo", filtering | {"--save": str(broken), "--load": str(broken)})
    found = metrics(broken)
    for step in (3, 4, 5):
        assert numbers(found[step]) == numbers(expected[step]), f"step {step}"
    first, second = (load_file(save / "hf" / "model.safetensors") for save in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
