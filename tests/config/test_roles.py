"""The table of roles: what a row decides, and that a new row is all that a frozen model needs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli import train_ppo
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.checks import check_ppo
from megarlhf.config.command_line import from_dict
from megarlhf.config.roles import ROLES, RoleSpec, layout_lines, roles_of
from megarlhf.metrics.keys import check_metrics
from megarlhf.planner.placement import Machine, plan_placement

TEACHER = RoleSpec(
    name="teacher",
    runs="megatron",
    checkpoint=("critic_pretrain", "pretrain"),
    head="lm",
    prefix="critic_",
    workers=(("critic_num_nodes", "actor_num_nodes"), ("critic_num_gpus_per_node", "actor_num_gpus_per_node")),
    awake={"train": ("parameters",)},
)


def make(**options: Any) -> PPOConfig:
    return from_dict(PPOConfig, {"pretrain": "m", "prompt_data": "d", "save": "s", **options})


def test_what_the_rows_say() -> None:
    own = {"critic_pretrain": "c", "critic_num_gpus_per_node": 3, "actor_num_gpus_per_node": 2}
    config = make(**own, vllm_num_engines=4, vllm_tensor_parallel_size=2, init_kl_coef=0.0)
    actor, critic, rollout = roles_of(config)
    assert [role.name for role in (actor, critic, rollout)] == ["actor", "critic", "rollout"]
    assert [role.start(config) for role in (actor, critic)] == [("pretrain", "m"), ("critic_pretrain", "c")]
    assert critic.start(make()) == ("pretrain", "m")
    assert [role.num_workers(config) for role in (actor, critic, rollout)] == [2, 3, 4]
    assert [role.devices_per_worker(config) for role in (actor, critic, rollout)] == [1, 1, 2]
    assert [role.trains for role in (actor, critic, rollout)] == [True, True, False]
    assert not actor.keeps_reference(config) and actor.keeps_reference(make()) and not critic.keeps_reference(make())
    assert rollout.parts == ("weights", "kv_cache") and actor.parts == ("parameters", "optimizer")
    assert [role.name for role in roles_of(make(advantage_estimator="rloo"))] == ["actor", "rollout"]
    assert critic.own_options(config) == {"critic_pretrain": "c", "critic_num_gpus_per_node": 3}
    assert actor.own_options(config) == rollout.own_options(config) == {}


def test_what_the_critic_inherits_is_said() -> None:
    actor = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    own = {"critic_pipeline_model_parallel_size": 1, "critic_context_parallel_size": 2}
    config = make(**actor, **own, num_virtual_stages_per_pipeline_rank=2)
    assert layout_lines(config) == [
        "critic: tensor_model_parallel_size=2 (the actor's), "
        "pipeline_model_parallel_size=1 (critic_pipeline_model_parallel_size), "
        "num_virtual_stages_per_pipeline_rank=None (not the actor's 2), "
        "context_parallel_size=2 (critic_context_parallel_size), "
        "expert_model_parallel_size=1 (the actor's), sequence_parallel=True (the actor's)"
    ]
    assert layout_lines(make(advantage_estimator="rloo")) == []


def test_a_new_row_is_placed_before_the_engines_and_cut_by_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROLES, "teacher", TEACHER)
    config = make(
        advantage_estimator="rloo",
        actor_num_gpus_per_node=2,
        critic_num_gpus_per_node=4,
        critic_tensor_model_parallel_size=2,
    )
    placed = plan_placement(config, Machine.alike("gpu", 1, 4, 8))
    assert [worker.role.name for worker in placed.workers] == ["actor"] * 2 + ["teacher"] * 4 + ["rollout"]
    assert [worker.place for worker in placed.of("teacher")] == ["tp0 dp0", "tp1 dp0", "tp0 dp1", "tp1 dp1"]
    assert re.search(r"^teacher +3 \(tp1 dp1\) +0 +3 +2 +train$", placed.table(), re.M)
    with pytest.raises(ValueError, match="critic_num_nodes x critic_num_gpus_per_node=4 GPUs do not fit on 1 node"):
        plan_placement(config, Machine.alike("gpu", 1, 3, 8))


def test_a_new_row_is_checked_like_any_other(monkeypatch: pytest.MonkeyPatch, assets: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(ROLES, "teacher", TEACHER)
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"input": "1=", "label": "1"}) + "\n")
    options = {"pretrain": str(assets / "model"), "prompt_data": str(data), "save": str(tmp_path / "run")}
    options |= {"reward_rule": "math", "advantage_estimator": "reinforce"}
    assert not [error for error in check_ppo(make(**options)) if "critic" in error]
    wrong = {"critic_tensor_model_parallel_size": 3, "critic_num_gpus_per_node": 4, "critic_pretrain": "nowhere"}
    said = "\n".join(check_ppo(make(**options, **wrong)))
    assert "critic_pretrain=nowhere is not a local directory" in said
    assert "critic_num_nodes=1 x critic_num_gpus_per_node=4 makes 4 ranks, no multiple of critic_tensor" in said
    del wrong["critic_pretrain"]
    said = "\n".join(check_ppo(make(**options, **wrong)))
    assert re.search("critic_tensor_model_parallel_size=3 does not divide num_attention_heads=.* of pretrain", said)


def test_numbers_of_ranks_for_roles_that_are_not_there_are_told(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"input": "1=", "label": "1"}\n')
    flags = {"pretrain": assets / "model", "prompt_data": tmp_path / "prompts.jsonl", "save": tmp_path / "run"}
    flags |= {"advantage_estimator": "rloo", "rollout_batch_size": 1, "n_samples_per_prompt": 2}
    flags |= {"global_batch_size": 2, "reward_rule": "math", "prompt_max_len": 8, "generate_max_len": 8}
    words = [f"--{key}={value}" for key, value in flags.items()]
    counts = ["--critic_num_gpus_per_node=3", "--reward_num_gpus_per_node=2", "--actor_num_gpus_per_node=1"]
    assert train_ppo.main([*words, *counts, "--dry-run"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "without effect" in line]
    said = "critic_num_gpus_per_node=3, reward_num_gpus_per_node=2 without effect: the run has no such role"
    assert notes == [f"note: {said}"]
    assert train_ppo.main([*words, "--dry-run"]) == 0 and "without effect" not in capsys.readouterr().err
    assert train_ppo.main([*words, "--critic_context_parallel_size=2", "--dry-run"]) == 2, "layouts are refused"
    assert "critic_context_parallel_size=2 is ignored with advantage_estimator=rloo" in capsys.readouterr().err


def test_a_dry_run_counts_a_frozen_models_bytes(
    monkeypatch: pytest.MonkeyPatch, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"input": f"{i}=", "label": "1"}) + "\n" for i in range(9)))
    flags = {"pretrain": assets / "model", "prompt_data": data, "save": tmp_path / "run", "reward_rule": "math"}
    sizes = {"rollout_batch_size": 8, "n_samples_per_prompt": 2, "global_batch_size": 8, "advantage_estimator": "rloo"}
    lengths = {"prompt_max_len": 8, "generate_max_len": 8}
    words = [str(word) for key, value in (flags | sizes | lengths).items() for word in (f"--{key}", value)]
    monkeypatch.setitem(ROLES, "teacher", TEACHER)
    assert train_ppo.main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^teacher +0 +0 +\S+ +\d+ +train$", printed, re.M)
    assert "teacher: tensor_model_parallel_size=1 (the actor's)" in printed
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in printed.splitlines()[::-1] if "  " in line}
    phases = rows["role", "part"]
    assert phases == ["rollout", "experience", "update", "sync", "save"]
    actor, teacher = (dict(zip(phases, rows[role, "parameters"], strict=True)) for role in ("actor", "teacher"))
    assert teacher["experience"] == teacher["update"] == actor["experience"] != "-", "the same model, and frozen"
    assert teacher["rollout"] == teacher["sync"] == teacher["save"] == "-"
    assert not {"gradients", "optimizer", "reference"} & {pair[1] for pair in rows if pair[0] == "teacher"}


def test_the_memory_of_any_role_may_be_logged() -> None:
    check_metrics({"memory/teacher/parameters_gib": 1.0})
    with pytest.raises(ValueError, match="memory/teacher/weights_gib"):
        check_metrics({"memory/teacher/weights_gib": 1.0})
