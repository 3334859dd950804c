"""Reward models in the table of roles: one row each, its layout, what the checks say of it, and what a plan shows."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli import train_ppo
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_rewards import moments
from megarlhf.config.command_line import from_dict, parse, to_yaml
from megarlhf.config.roles import layout_lines, megatron_roles, reward_roles, roles_of, row_of
from megarlhf.planner.placement import Machine, plan_placement
from tests.config.test_checks import TOKENIZER, check, only, write_model
from tests.tiny_models import make_reward_model

__all__ = ["check"]

BASE = {"pretrain": "m", "prompt_data": "d", "save": "s"}
Check = Callable[..., list[str]]


def make(**options: Any) -> PPOConfig:
    return from_dict(PPOConfig, BASE | options)


def test_each_model_is_a_role_with_its_own_value_of_each_option() -> None:
    layout = {"reward_tensor_model_parallel_size": (2, 4), "reward_pipeline_model_parallel_size": (3,)}
    config = make(reward_pretrain="a, b", reward_num_gpus_per_node=12, sequence_parallel=True, **layout)
    assert [role.name for role in roles_of(config)] == ["actor", "critic", "reward_0", "reward_1", "rollout"]
    first, second = reward_roles(config)
    assert first.start(config) == ("reward_pretrain[0]", "a") and second.start(config) == ("reward_pretrain[1]", "b")
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel")
    assert [[getattr(role.layout(config), size) for size in sizes] for role in (first, second)] == [
        [2, 3, True],
        [4, 3, True],
    ]
    assert [role.num_workers(config) for role in megatron_roles(config)] == [1, 1, 12, 12]
    assert not first.trains and first.head == "value" and row_of("reward_1").awake == second.awake
    assert any(line.startswith("reward_1: tensor_model_parallel_size=4 (reward_ten") for line in layout_lines(config))
    (alone,) = reward_roles(make(reward_pretrain="a"))
    assert alone.name == "reward" and alone.start(make(reward_pretrain="a")) == ("reward_pretrain", "a")
    assert reward_roles(make()) == []


def test_a_critic_starts_from_the_first_reward_model_unless_told_otherwise() -> None:
    def start(**options: Any) -> tuple[str, str]:
        config = make(**options)
        return next(role for role in megatron_roles(config) if role.name == "critic").start(config)

    assert start() == ("pretrain", "m")
    assert start(reward_pretrain="a,b") == ("reward_pretrain[0]", "a")
    assert start(reward_pretrain="a,b", critic_pretrain="c") == ("critic_pretrain", "c")


def test_options_of_several_models_are_read_with_commas_and_come_back(tmp_path: Path) -> None:
    words = [word for name, value in BASE.items() for word in (f"--{name}", value)]
    words += ["--reward_pretrain", "a,b", "--reward_context_parallel_size", "1,2", "--reward_weights", "0.5,-2"]
    config, _ = parse(PPOConfig, [*words, "--reward_sequence_parallel", "false,true"], "ppo")
    assert config.reward_layout.reward_context_parallel_size == (1, 2)
    assert config.reward_layout.reward_sequence_parallel == (False, True)
    assert config.reward.reward_weights == (0.5, -2.0)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert parse(PPOConfig, ["--config", str(tmp_path / "c.yaml")], "ppo")[0] == config
    for flag, value in (("--reward-sequence-parallel", True), ("--no_reward_sequence_parallel", False)):
        assert parse(PPOConfig, [*words, flag], "ppo")[0].reward_layout.reward_sequence_parallel == (value,)
    with pytest.raises(SystemExit):
        parse(PPOConfig, [*words, "--reward_context_parallel_size", "1,x"], "ppo")


@pytest.fixture
def judge(tmp_path: Path) -> str:
    return write_model(tmp_path / "judge", architectures=["LlamaForSequenceClassification"])


def test_sound_reward_models_have_no_mistake(check: Check, judge: str, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", tokenizer=TOKENIZER | {"model": {"vocab": {"a": 0}}}, vocab_size=2)
    assert check(reward_pretrain=judge, reward_rule=None) == []
    assert check(reward_pretrain=f"{judge},{other}", reward_weights=(1, 2, 3)) == [], "the second reads text"
    layout = {"reward_pipeline_model_parallel_size": (1, 3), "reward_num_gpus_per_node": 6, "global_batch_size": 2}
    few = layout | {"rollout_batch_size": 2}
    assert check(reward_pretrain=f"{judge},{judge}", **few) == [], "a rank may have nothing to score"
    shared = {"n_samples_per_prompt": 2, "share_prompt_prefix": True}
    context = {"reward_context_parallel_size": (2,), "reward_num_gpus_per_node": 2}
    assert check(reward_pretrain=judge, **shared, **context) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_pretrain": "/nowhere,{}"}, r"^reward_pretrain=/nowhere is not a local directory"),
        ({"reward_tensor_model_parallel_size": (2,)}, r"^reward_tensor_model_parallel_size=2 is ignored without"),
        (
            {"reward_pretrain": "{},{}", "reward_context_parallel_size": (1, 1, 1)},
            r"^reward_context_parallel_size=1,1,1 has 3 values for 2 models: give one, or as many",
        ),
        (
            {"reward_pretrain": "{},{}", "reward_tensor_model_parallel_size": (1, 3), "reward_num_gpus_per_node": 3},
            r"^reward_tensor_model_parallel_size=3 does not divide num_attention_heads=8 of reward_pretrain\[1\]",
        ),
        (
            {"reward_pretrain": "{}", "reward_pipeline_model_parallel_size": (2,), "reward_num_gpus_per_node": 3},
            r"^reward_num_nodes|^actor_num_nodes=1 x reward_num_gpus_per_node=3 makes 3 ranks, no multiple of",
        ),
        ({"reward_pretrain": "{}", "reward_pipeline_model_parallel_size": (0,)}, "must be at least 1"),
        ({"reward_pretrain": "{}", "reward_weights": (1,)}, r"^reward_weights=1.0 has 1 numbers for 2 sources"),
        ({"reward_weights": (float("inf"),)}, "must be finite numbers"),
        ({"reward_pretrain": "{}", "normalize_reward": True}, r"^normalize_reward=True needs mean and std in config"),
    ],
)
def test_mistakes(check: Check, judge: str, changes: dict[str, Any], said: str) -> None:
    given = {k: v.replace("{}", judge) if isinstance(v, str) else v for k, v in changes.items()}
    errors = check(**given)
    assert any(re.search(said, error) for error in errors), errors


def test_what_a_reward_model_must_be_among_the_files(check: Check, judge: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "is an adapter" in "\n".join(check(reward_pretrain=str(tmp_path / "adapter")))
    short = write_model(tmp_path / "short", max_position_embeddings=40)
    assert "max_position_embeddings=40 of reward_pretrain" in only(check(reward_pretrain=short, critic_pretrain=judge))
    small = write_model(tmp_path / "small", vocab_size=2)
    assert "vocab_size=2, less than vocab_size=3" in only(check(reward_pretrain=small, critic_pretrain=judge))
    other = write_model(tmp_path / "other", tokenizer=TOKENIZER | {"model": {"vocab": {"a": 0}}})
    assert "set critic_pretrain, or use" in only(check(reward_pretrain=other)), "its critic would read other tokens"
    assert check(reward_pretrain=other, advantage_estimator="reinforce") == []


def test_running_moments_are_of_rewards_without_a_model() -> None:
    assert make(normalize_reward=True).keeps_reward_moments and not make().keeps_reward_moments
    assert not make(normalize_reward=True, reward_pretrain="a").keeps_reward_moments


def test_the_moments_of_a_checkpoint() -> None:
    assert moments({"mean": 1, "std": 0.5}) == (1.0, 0.5)
    numbers = ((None, None), (1.0, None), (1.0, 0), ("1", 1), (1, float("nan")), (True, 1))
    assert all(moments({"mean": mean, "std": std}) is None for mean, std in numbers)


def words(assets: Path, tmp_path: Path, **options: Any) -> list[str]:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"input": f"{i}=", "label": "1"}) + "\n" for i in range(9)))
    flags = {"pretrain": assets / "model", "prompt_data": data, "save": tmp_path / "run"}
    flags |= {"rollout_batch_size": 8, "n_samples_per_prompt": 2, "global_batch_size": 8, "prompt_max_len": 8}
    flags |= {"generate_max_len": 8, "vllm_kv_cache_gib": 0.01} | options
    return [str(word) for key, value in flags.items() for word in (f"--{key}", value)]


def judge_of(assets: Path, directory: Path, **entries: Any) -> Path:
    return make_reward_model(directory, entries=entries, vocab_size=128)


def test_a_dry_run_plans_reward_models(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = judge_of(assets, tmp_path / "judge", mean=0.5, std=2.0)
    options = {"reward_pretrain": f"{model},{model}", "reward_num_gpus_per_node": 2, "normalize_reward": "True"}
    options |= {"reward_pipeline_model_parallel_size": "2,1", "critic_pretrain": assets / "model", "lora_rank": 2}
    assert train_ppo.main([*words(assets, tmp_path, **options), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^reward_0 +1 \(pp1\) +0 +\S+ +\d+ +reward$", printed, re.M)
    assert re.search(r"^reward_1 +1 \(dp1\) +0 +\S+ +\d+ +reward$", printed, re.M)
    said = r"^reward_model_1 \(.*judge\) reads the policy's tokens; reward = \(score - 0.5\) / 2$"
    assert re.search(said, printed, re.M)
    rows: dict[tuple[str, ...], list[str]] = {}
    for line in printed.splitlines():
        rows.setdefault(tuple(line.split()[:2]), line.split()[2:])  # of the fullest device of the first table
    columns = ["rollout", "reward_0", "reward_1", "experience", "update actor", "update critic", "sync", "save"]
    assert rows["role", "part"] == " ".join(columns).split()
    first, second = (dict(zip(columns, rows[role, "parameters"], strict=True)) for role in ("reward_0", "reward_1"))
    assert {phase for phase, held in first.items() if held != "-"} == {"reward_0", "reward_1"}
    assert float(second["reward_0"]) > float(first["reward_0"]), "a whole model beside half of one"
    activations = dict(zip(columns, rows["reward_1", "activations"], strict=True))
    assert {phase for phase, held in activations.items() if held != "-"} == {"reward_1"}, "one after another"
    parts = {row[1] for row in rows if len(row) == 2 and row[0].startswith("reward")}
    assert not {"gradients", "optimizer", "reference"} & parts


def test_disjoint_models_have_devices_of_their_own() -> None:
    config = make(reward_pretrain="a,b", colocate_all_models=False, actor_num_gpus_per_node=2)
    placed = plan_placement(config, Machine.alike("gpu", 1, 9, 8))
    assert [(w.role.name, w.devices) for w in placed.workers][4:] == [
        *(("reward_0", (4,)), ("reward_0", (5,)), ("reward_1", (6,)), ("reward_1", (7,)), ("rollout", (8,))),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures=\['LlamaForCausalLM'\] is no reward model"),
        ({"id2label": {"0": "a", "1": "b"}}, r"num_labels=2 \(its default is 2\), and a reward is one number"),
        ({}, r"its head is \['value_head.weight'\], and a reward is read by score.weight alone"),
    ],
)
def test_other_heads_are_refused(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    from safetensors.torch import load_file, save_file

    model = judge_of(assets, tmp_path / "judge", **change)
    if not change:
        weights = load_file(model / "model.safetensors")
        weights["value_head.weight"] = weights.pop("score.weight")
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    options = {"reward_pretrain": model, "advantage_estimator": "reinforce"}
    assert train_ppo.main([*words(assets, tmp_path, **options), "--dry-run"]) == 2
    assert re.search(rf"reward_pretrain=\S*judge; .*{said}", capsys.readouterr().err)
