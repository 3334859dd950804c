"""Whole runs whose rewards come from `megarlhf serve-rm`: as from the same model inside, and what its end leaves."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_serve_rm import Server
from tests.cluster.runs import SMALL, metrics, run, start, write_inputs
from tests.cluster.test_reward_runs import reward_model

pytestmark = pytest.mark.slow


def test_a_served_reward_model_gives_the_rewards_and_weights_of_the_same_model_inside(
    assets: Path, tmp_path: Path
) -> None:
    model = str(reward_model(assets, tmp_path / "rm", seed=5, mean=0.25, std=0.5))
    flags = SMALL | write_inputs(tmp_path) | {"--pretrain": str(assets / "model"), "--train-iters": "1"}
    del flags["--reward_function"]
    flags |= {"--critic_pretrain": model, "--actor-learning-rate": "0.001", "--eval-interval": "1"}
    inside = {"--reward_pretrain": model, "--normalize_reward": None}
    run("train_ppo", flags | inside | {"--save": str(tmp_path / "inside")})
    limits = ("--max_len", "64", "--max_batch_tokens", "96")
    server = Server(tmp_path, "--reward_pretrain", model, "--normalize_reward", *limits)
    try:
        remote = {"--remote_rm_url": server.url, "--remote_rm_batch_size": "3"}
        run("train_ppo", flags | remote | {"--save": str(tmp_path / "served")})
    finally:
        assert server.stop() == 0
    one, other = metrics(tmp_path / "inside"), metrics(tmp_path / "served")
    assert abs(one[1]["reward/mean"]) > 0.01 and one[1]["reward/std"] > 0.01
    for key in ("reward/mean", "reward/std", "rollout/response_length_mean", "rollout/truncated_frac"):
        assert other[1][key] == pytest.approx(one[1][key], abs=1e-5), key
    assert 0 < one[1]["rollout/truncated_frac"] < 1, "responses of both ends"
    for step in (0, 1):
        assert other[step]["eval/reward_mean"] == pytest.approx(one[step]["eval/reward_mean"], abs=1e-4)
    before = load_file(assets / "model" / "model.safetensors")
    weights, others = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("inside", "served"))
    assert max(float((weights[name] - before[name]).abs().max()) for name in before) > 5e-4
    for name, weight in weights.items():
        # Adam divides by the gradient's size, so that rounding of rewards shows where that is small.
        torch.testing.assert_close(others[name], weight, atol=1e-5, rtol=0, msg=name)


def test_a_server_that_is_killed_ends_the_run_with_its_last_step_saved(assets: Path, tmp_path: Path) -> None:
    server = Server(tmp_path)
    flags = SMALL | write_inputs(tmp_path) | {"--pretrain": str(assets / "model"), "--train-iters": "50"}
    del flags["--reward_function"]
    flags |= {"--remote_rm_url": server.url, "--remote_rm_max_retries": "2", "--remote_rm_timeout_seconds": "20"}
    save = tmp_path / "run"
    process = start("train_ppo", flags | {"--save": str(save)})
    deadline = time.monotonic() + 300
    while not (save / "metrics.jsonl").is_file() or len((save / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    killed = time.monotonic()
    assert process.wait(90) == 1
    assert time.monotonic() - killed < 60
    said, last = process.read(), max(metrics(save))
    assert f"in step {last + 1}, which is not trained, the reward gave no result for" in said
    assert "(remote for" in said and "max_no_result_fraction=0.1 allows" in said and "ConnectError" in said
    assert f"the state after step {last} is saved: mend the cause, and continue with load" in said
    state = json.loads((save / "checkpoints" / f"iter_{last:07d}" / "run_state.json").read_text())
    assert state["step"] == last and state["untrained_steps"] == 0
