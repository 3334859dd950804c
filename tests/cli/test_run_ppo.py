"""What a run decides where its configuration leaves it open."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli import rewards, run_ppo
from megarlhf.cli.main import main
from megarlhf.cli.prompt_data import load_data
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict, parse
from megarlhf.formats import run_checkpoints
from megarlhf.trainers.best import Best
from megarlhf.trainers.roles import NodeLostError, RoleFailedError
from tests.cluster.runs import write_inputs
from tests.tiny_models import make_model


@pytest.mark.parametrize(
    ("flags", "cores", "expected"),
    [
        (["--reward_function", "r.py"], 64, 1),
        (["--reward_rule", "math"], 4, 4),
        (["--reward_rule", "math"], 64, 8),
        (["--reward_rule", "math", "--reward_num_workers", "3"], 64, 3),
        (["--reward_function", "r.py", "--reward_num_workers", "3"], 1, 3),
    ],
)
def test_rules_run_on_all_cores_and_functions_that_may_keep_state_in_one_process(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], cores: int, expected: int
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(rewards, "num_cores", lambda: cores)
    monkeypatch.setattr(rewards, "RewardScorer", lambda **options: given.append(options["num_workers"]))
    config, _ = parse(PPOConfig, ["--pretrain", "m", "--prompt_data", "p", "--save", "s", *flags], "ppo")
    rewards.reward_sources(config.reward)
    assert given == [expected]


def test_prompts_of_both_data_sets_are_counted(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, values in (("train", "123"), ("eval", "34")):
        lines = [f'{{"input": "{value}", "label": "1"}}\n' for value in values]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    flags = {"pretrain": assets / "model", "prompt_data": tmp_path / "train.jsonl", "save": "s", "reward_function": "r"}
    for evaluation, said in (("eval", "warning: 1 of 2 prompts of"), (None, "")):
        given = flags | ({} if evaluation is None else {"eval_data": tmp_path / f"{evaluation}.jsonl"})
        config, _ = parse(PPOConfig, [f"--{key}={value}" for key, value in given.items()], "ppo")
        load_data(config)
        printed = capsys.readouterr().err
        assert printed.startswith(said) if said else printed == ""


def failing(save: Path, *, saved: dict[int, int | None], given: list[tuple[str | None, int | None]]) -> Any:
    """An attempt that leaves a checkpoint of the step that is named for its number, and fails where that has one."""

    def attempt(config: PPOConfig, continued: int | None) -> Best:
        given.append((config.logging.load, continued))
        number = len(given)
        if number not in saved:
            return Best(metric="m", step=number)
        if (step := saved[number]) is not None:
            run_checkpoints.begin(save / "checkpoints", step)
            run_checkpoints.commit(save / "checkpoints", step, {"step": step}, keep=5)
        raise RoleFailedError(f"rank {number} died", trains=True)

    return attempt


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (3, [(None, None), (None, -1), ("save", 4), ("save", 6)]),  # the first left no checkpoint
        (2, [(None, None), (None, -1), ("save", 4)]),
        (0, [(None, None)]),
    ],
)
def test_a_run_starts_again_from_its_last_checkpoint_as_often_as_it_may(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], most: int, expected: list[tuple[str | None, int | None]]
) -> None:
    save, given = tmp_path / "save", list[tuple[str | None, int | None]]()
    config, _ = parse(PPOConfig, ["--pretrain", "m", "--prompt_data", "p", "--save", str(save)], "ppo")
    attempt = failing(save, saved={1: None, 2: 4, 3: 6}, given=given)

    def run() -> Best:
        return run_ppo.with_restarts(config, attempt, continued=None, max_restarts=most, should_stop=lambda: False)

    if most == 3:
        assert run().step == 4
    else:
        with pytest.raises(RoleFailedError, match=f"rank {most + 1} died"):
            run()
    assert given == [(None if load is None else str(save), step) for load, step in expected]
    said = capsys.readouterr().err
    assert said.count("starting again") == len(expected) - 1
    assert most == 0 or f"rank 2 died\nstarting again after step 4; max_restarts leaves {most - 2} more" in said


@pytest.mark.parametrize("program", ["ppo", "sft"])
def test_a_checkpoint_that_names_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    """Before a rank has Megatron-Core read it, which unpickles whatever is there."""

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "touched",)

    partial = run_checkpoints.begin(tmp_path / "checkpoints", 3)
    (partial / "actor").mkdir()
    metadata = partial / "actor" / ".metadata"
    metadata.write_bytes(pickle.dumps(Attack()))
    run_checkpoints.commit(tmp_path / "checkpoints", 3, {"step": 3, "identity": {"seed": 1}}, keep=5)
    files = write_inputs(tmp_path / "inputs")
    ppo = [*(word for pair in files.items() for word in pair), "--prompt_max_len", "16", "--generate_max_len", "8"]
    data = ppo if program == "ppo" else ["--dataset", files["--eval_data"], "--output_key", "label", "--max_len", "32"]
    model = ["--pretrain", str(make_model(tmp_path / "model")), "--save", str(tmp_path / "run")]
    assert main([program, *model, *data, "--load", str(tmp_path), "--dry-run"]) == 2
    assert "iter_0000003/actor/.metadata cannot be read: it names pathlib" in capsys.readouterr().err
    assert not (tmp_path / "touched").exists()


def test_too_few_nodes_for_another_attempt(tmp_path: Path) -> None:
    config, _ = parse(PPOConfig, ["--pretrain", "m", "--prompt_data", "p", "--save", str(tmp_path)], "ppo")
    fails, lost = failing(tmp_path, saved={1: 2}, given=[]), iter([False, True])

    def attempt(config: PPOConfig, continued: int | None) -> Best:
        if next(lost):
            raise NodeLostError("node 10.0.0.5 is lost")
        return fails(config, continued)

    with pytest.raises(NodeLostError, match="10.0.0.5") as error:
        run_ppo.with_restarts(config, attempt, continued=None, max_restarts=5, should_stop=lambda: False)
    assert error.value.__notes__ == [f"continue with load={tmp_path}, whose last checkpoint is of step 2"]


def test_a_run_that_is_told_to_stop_does_not_start_again(tmp_path: Path) -> None:
    config, _ = parse(PPOConfig, ["--pretrain", "m", "--prompt_data", "p", "--save", str(tmp_path)], "ppo")
    attempt = failing(tmp_path, saved={1: 2}, given=[])
    with pytest.raises(RoleFailedError, match="rank 1 died"):
        run_ppo.with_restarts(config, attempt, continued=None, max_restarts=3, should_stop=lambda: True)


@pytest.mark.parametrize(
    ("gpus", "options", "nodes"),
    [
        (0, {"actor_num_nodes": 2, "critic_num_nodes": 3}, 3),
        (0, {"actor_num_nodes": 2, "vllm_num_engines": 9, "colocate_all_models": False}, 2),
        (8, {"actor_num_nodes": 2, "vllm_num_engines": 17}, 3),
        (8, {"actor_num_nodes": 2, "critic_num_nodes": 1, "vllm_num_engines": 9, "colocate_all_models": False}, 5),
        (8, {"vllm_num_engines": 9, "colocate_all_models": False}, 1),  # one node is this machine
    ],
)
def test_a_dry_run_plans_with_as_many_nodes_as_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, gpus: int, options: dict[str, Any], nodes: int
) -> None:
    monkeypatch.setattr(run_ppo, "num_local_gpus", lambda: gpus)
    monkeypatch.setattr(run_ppo, "device_kind", lambda: "gpu" if gpus else "cpu")
    config = from_dict(PPOConfig, {"pretrain": "m", "prompt_data": "d", "save": "s"} | options)
    machine = run_ppo.find_machine(config, dry_run=True)
    assert [node.gpus for node in machine.nodes] == [gpus] * nodes
    most = max(("actor_num_nodes", "critic_num_nodes"), key=lambda option: options.get(option, 1))
    if nodes > 1:
        with pytest.raises(ValueError, match=f"^{most}={options[most]} needs a running Ray cluster: set ray_address"):
            run_ppo.find_machine(config)
