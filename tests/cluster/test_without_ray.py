"""Workers as child processes give what Ray's give, bit for bit; nothing of Ray is imported then."""

import os
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli.main import main
from megarlhf.cli.programs import Program
from megarlhf.config.arguments import PPOConfig
from tests.cluster.runs import SMALL, Run, command, metrics, run, write_inputs

Flags = dict[str, str | None]

GAE: Flags = {"--actor_num_gpus_per_node": "2", "--init_kl_coef": "0.05", "--max_epochs": "2"}
DISJOINT: Flags = {
    **{"--actor_num_gpus_per_node": "2", "--pipeline-model-parallel-size": "2", "--vllm_num_engines": "2"},
    **{"--advantage_estimator": "rloo", "--no_colocate_all_models": None, "--rollout_batch_size": "7"},
    **{"--n_samples_per_prompt": "4", "--global-batch-size": "14"},
}


def untimed(save: Path) -> dict[int, dict[str, Any]]:
    """Every metric that does not depend on the clock."""
    return {
        step: {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
        for step, row in metrics(save).items()
    }


@pytest.fixture
def flags(assets: Path, tmp_path: Path) -> Flags:
    inputs = write_inputs(tmp_path) | {"--pretrain": str(assets / "model")}
    return SMALL | inputs | {"--train-iters": "3", "--eval-interval": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("own", [GAE, DISJOINT], ids=["gae, DP2", "rloo, PP2, disjoint, two engines"])
def test_the_same_run_as_with_ray(flags: Flags, tmp_path: Path, own: Flags) -> None:
    """Without Ray in a place where Ray cannot be imported: `import ray` finds a package that refuses it."""
    fence = tmp_path / "fence" / "ray"
    fence.mkdir(parents=True)
    (fence / "__init__.py").write_text("raise ImportError('this run has no Ray')\n")
    saves = {program: tmp_path / program for program in ("train_ppo_ray", "train_ppo")}
    run("train_ppo_ray", flags | own | {"--save": str(saves["train_ppo_ray"])})
    words = command("train_ppo", flags | own | {"--save": str(saves["train_ppo"])})
    path = os.pathsep.join([str(fence.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = Run(["env", f"PYTHONPATH={path}", *words])
    process.wait(timeout=600)
    assert process.returncode == 0, process.read()
    first, second = (untimed(save) for save in saves.values())
    assert set(first) == {0, 1, 2, 3} and first == second
    weights = [(save / "hf" / "model.safetensors").read_bytes() for save in saves.values()]
    assert weights[0] == weights[1]
    assert weights[0] != (Path(str(flags["--pretrain"])) / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("program", "more", "ray"),
    [
        ("train_ppo", [], False),
        ("train_ppo", ["--ray"], True),
        ("train_ppo_ray", [], True),
        ("train_ppo_ray", ["--no_ray"], False),
        ("ppo", [], True),
        ("ppo", ["--no_ray"], False),
        ("ppo", ["--config", "no_ray.yaml"], False),
    ],
)
def test_who_runs_in_ray(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, more: list[str], ray: bool
) -> None:
    from megarlhf.cli import train_ppo, train_ppo_ray

    found: list[bool | None] = []

    def start(program: Program, config: PPOConfig, arguments: list[str], dry_run: bool) -> int:
        found.append(program.resolve(config).cluster.ray)
        return 0

    monkeypatch.setattr(Program, "start", start)
    monkeypatch.chdir(tmp_path)
    Path("no_ray.yaml").write_text("ray: false\n")
    words = ["--pretrain", "m", "--prompt_data", "d", "--save", "s", "--reward_rule", "math", *more]
    modules = {"train_ppo": train_ppo.main, "train_ppo_ray": train_ppo_ray.main}
    status = modules[program](words) if program in modules else main([program, *words])
    assert (status, found) == (0, [ray])
