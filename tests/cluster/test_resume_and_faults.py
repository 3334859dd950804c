"""Kill, resume, signals: what a run leaves behind and how it goes on, with Ray or without. Whole runs, so slow."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.runs import SMALL, Run, metrics, run, start, write_inputs

pytestmark = pytest.mark.slow
UNTIMED = ("reward/", "kl/", "policy/", "critic/", "advantage/", "return/", "rollout/", "sync/", "data/")


def numbers(row: dict[str, float]) -> dict[str, float]:
    """What must not depend on the clock."""
    return {key: value for key, value in row.items() if key.startswith(UNTIMED)}


@pytest.fixture
def flags(assets: Path, tmp_path: Path) -> dict[str, str | None]:
    """Two ranks at DP2, six steps, a checkpoint a step."""
    common = SMALL | write_inputs(tmp_path) | {"--pretrain": str(assets / "model")}
    return common | {"--train-iters": "6", "--save-interval": "1", "--actor_num_gpus_per_node": "2"}


def wait_for_step(process: Run, save: Path, step: int) -> None:
    """Until the pointer names a step."""
    pointer = save / "checkpoints" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 300
    while not (pointer.exists() and int(pointer.read_text()) >= step):
        assert process.poll() is None, process.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(process: Run, name: str) -> list[psutil.Process]:
    """Worker processes below a run, by what their command lines have: Ray's the class, children role and rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if name in " ".join(child.cmdline())]


def test_kill_and_resume_gives_the_same_run(flags: dict[str, str | None], tmp_path: Path) -> None:
    """It is killed without Ray, where its processes end by themselves, and goes on in Ray; prompts are of a mixture."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    (tmp_path / "more.jsonl").write_text("".join(f'{{"input": "{i}{i}{i}=", "label": "0"}}\n' for i in range(9)))
    flags |= {"--prompt_data": f"{flags['--prompt_data']},{tmp_path / 'more.jsonl'}", "--prompt_data_probs": "0.6,0.4"}
    run("train_ppo_ray", flags | {"--save": str(whole)})
    process = start("train_ppo", flags | {"--save": str(broken)})
    wait_for_step(process, broken, 3)
    children = psutil.Process(process.pid).children(recursive=True)
    names = [" ".join(child.cmdline()) for child in children]
    assert all(any(role in name for name in names) for role in ("actor-1", "critic-1", "rollout-0")), names
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(children, timeout=10)
    assert not left
    saved = int((broken / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < 6
    run("train_ppo_ray", flags | {"--save": str(broken), "--load": str(broken)})
    expected, found = metrics(whole), metrics(broken)
    assert set(found) == set(expected)
    for step in range(1, 7):
        assert numbers(found[step]) == numbers(expected[step]), f"step {step}"
    first, second = (load_file(d / "hf" / "model.safetensors") for d in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_in_another_layout(flags: dict[str, str | None], tmp_path: Path) -> None:
    save = tmp_path / "first"
    run("train_ppo", flags | {"--save": str(save), "--actor_num_gpus_per_node": "1", "--max_ckpt_num": "6"})
    (save / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    kept = tmp_path / "second"
    layout = {"--pipeline-model-parallel-size": "2", "--actor_num_gpus_per_node": "2"}
    run("train_ppo", flags | layout | {"--save": str(kept), "--load": str(save)})
    expected, found = metrics(save), metrics(kept)
    assert set(found) == {4, 5, 6}
    for key in ("policy/loss", "critic/loss"):
        assert found[4][key] == pytest.approx(expected[4][key], abs=1e-5), key


@pytest.mark.parametrize(("program", "name"), [("train_ppo_ray", "SIGTERM"), ("train_ppo", "SIGUSR1")])
def test_signal_finishes_the_step_and_saves(
    flags: dict[str, str | None], tmp_path: Path, program: str, name: str
) -> None:
    save = tmp_path / "run"
    process = start(program, flags | {"--save": str(save), "--train-iters": "500", "--save-interval": "1000"})
    deadline = time.monotonic() + 300
    while not (save / "metrics.jsonl").exists() or len(metrics(save)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, getattr(signal, name))
    process.wait(timeout=120)
    assert process.returncode == 0, process.read()
    last = max(metrics(save))
    assert int((save / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()) == last < 500
    assert json.loads((save / "checkpoints" / f"iter_{last:07d}" / "run_state.json").read_text())["step"] == last
    assert (save / "hf" / "model.safetensors").exists()


def test_dead_engine_leaves_the_last_finished_step(flags: dict[str, str | None], tmp_path: Path) -> None:
    save = tmp_path / "run"
    rare = {"--advantage_estimator": "rloo", "--train-iters": "500", "--save-interval": "1000", "--save": str(save)}
    process = start("train_ppo_ray", flags | rare)
    deadline = time.monotonic() + 300
    while not (save / "metrics.jsonl").exists() or len(metrics(save)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers_of(process, "RolloutWorker")[0].kill()
    process.wait(timeout=120)
    output = process.read()
    assert process.returncode == 1 and "rollout rank 0 died" in output and "last lines of" in output, output
    saved = int((save / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved >= 2 and f"the state after step {saved} is saved" in output
    run("train_ppo_ray", flags | rare | {"--load": str(save), "--train-iters": str(saved + 1)})
    assert max(metrics(save)) == saved + 1
