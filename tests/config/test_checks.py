"""Checks of a configuration: a sound one has no mistake, and each bad one is told with its key."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_layout import world_errors
from megarlhf.config.check_rewards import reward_errors
from megarlhf.config.checks import ConfigError, check_parity, check_ppo, check_supervised, raise_if
from megarlhf.config.command_line import from_dict
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.reward_arguments import RewardArguments
from megarlhf.config.roles import ROLES
from megarlhf.config.supervised_arguments import ParityConfig, SFTConfig

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "max_position_embeddings": 64,
    "vocab_size": 3,
}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "</s>", "id": 2}]}


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def write_model(directory: Path, *, tokenizer: dict[str, Any] = TOKENIZER, **changes: Any) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODEL | changes))
    (directory / "model.safetensors").write_bytes(b"")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text("{}")
    return str(directory)


Check = Callable[..., list[str]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Mistakes of a sound PPO configuration with the given changes."""
    data = tmp_path / "prompts.jsonl"
    data.write_text('\n{"input": "1 + 1", "label": "2"}\n')
    base = {
        "pretrain": write_model(tmp_path / "model"),
        "prompt_data": str(data),
        "save": str(tmp_path / "runs" / "new"),
        "reward_rule": "math",
        "prompt_max_len": 32,
        "generate_max_len": 32,
    }
    return lambda **changes: check_ppo(from_dict(PPOConfig, base | changes))


@pytest.fixture
def check_sft(tmp_path: Path) -> Check:
    """Mistakes of a sound SFT configuration with the given changes."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"input": "1 + 1", "output": "2"}\n')
    base = {
        "pretrain": write_model(tmp_path / "model"),
        "dataset": str(data),
        "save": str(tmp_path / "run"),
        "output_key": "output",
        "max_len": 64,
    }
    return lambda **changes: check_supervised(from_dict(SFTConfig, base | changes))


@pytest.fixture
def check_kd(tmp_path: Path, check_sft: Check) -> Check:
    """Mistakes of a sound configuration of distillation with the given changes."""
    base = {
        "pretrain": str(tmp_path / "model"),
        "teacher_model": write_model(tmp_path / "teacher", num_hidden_layers=6, vocab_size=5),
        "dataset": str(tmp_path / "pairs.jsonl"),
        "save": str(tmp_path / "run"),
        "max_len": 64,
    }
    return lambda **changes: check_supervised(from_dict(KDConfig, base | changes))


def only(errors: list[str]) -> str:
    assert len(errors) == 1, errors
    return errors[0]


def test_sound_configurations_have_no_mistake(check: Check) -> None:
    assert check() == []
    assert check(tensor_model_parallel_size=2, sequence_parallel=True, actor_num_gpus_per_node=4) == []
    assert check(advantage_estimator="group_norm", n_samples_per_prompt=4, share_prompt_prefix=True) == []
    assert check(top_p=0.9, min_p=0.02, top_k=64, max_epochs=3) == []
    assert check(top_p=0.9, init_kl_coef=0) == []


def test_mistakes_are_collected_one_a_line(check: Check) -> None:
    errors = check(tensor_model_parallel_size=3, gamma=2, top_p=1.9, reward_rule=None, pipeline_model_parallel_size=5)
    with pytest.raises(ConfigError) as raised:
        raise_if(errors)
    assert str(raised.value).split("\n") == errors
    for key in (
        "tensor_model_parallel_size=3",
        "pipeline_model_parallel_size=5",
        "gamma=2",
        "top_p=1.9",
        "reward_rule=None",
    ):
        assert key in str(raised.value)
    raise_if([])


EXPERTS = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_model_parallel_size": 3, "actor_num_gpus_per_node": 3}, "does not divide experts=4"),
        (
            {"tensor_model_parallel_size": 2, "actor_num_gpus_per_node": 2},
            "tensor_model_parallel_size=2 needs sequence_parallel with the experts of pretrain",
        ),
        (
            {"expert_model_parallel_size": 4, "actor_num_gpus_per_node": 2},
            "no multiple of expert_model_parallel_size * expert_tensor_parallel_size",
        ),
        (
            {"expert_tensor_parallel_size": 7, "expert_model_parallel_size": 2, "actor_num_gpus_per_node": 14},
            "does not divide width of an expert=",
        ),
        (
            {"expert_tensor_parallel_size": 2, "actor_num_gpus_per_node": 2},
            "expert_tensor_parallel_size=2 differs from tensor_model_parallel_size=1 with expert_model_parallel_size=1",
        ),
    ],
)
def test_mistakes_about_experts(check: Check, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    model = write_model(tmp_path / "experts", **EXPERTS)
    assert check(pretrain=model, expert_model_parallel_size=2, actor_num_gpus_per_node=2) == []
    assert said in only(check(pretrain=model, **changes))


def test_the_critic_has_its_own_layout_or_the_actors() -> None:
    base = {"pretrain": "m", "prompt_data": "d", "save": "s"}
    actor = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
    }
    config = from_dict(PPOConfig, base | actor)
    assert ROLES["critic"].layout(config) == ROLES["actor"].layout(config) == config.layout
    config = from_dict(PPOConfig, base | actor | {"critic_pipeline_model_parallel_size": 4})
    critic = ROLES["critic"].layout(config)
    assert (critic.pipeline_model_parallel_size, critic.virtual_stages) == (4, 1), "the actor's chunks do not count"
    assert (critic.tensor_model_parallel_size, critic.sequence_parallel) == (2, True)
    config = from_dict(PPOConfig, base | actor | {"critic_tensor_model_parallel_size": 1})
    critic = ROLES["critic"].layout(config)
    assert (critic.tensor_model_parallel_size, critic.sequence_parallel) == (1, False)
    assert (critic.pipeline_model_parallel_size, critic.virtual_stages) == (2, 2)
    experts = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    config = from_dict(PPOConfig, base | experts | {"critic_expert_model_parallel_size": 1})
    assert ROLES["critic"].layout(config).expert_tensor_parallel_size is None, "it belongs to the actor's experts"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context_parallel_size": 2, "share_prompt_prefix": True}, "does not work with context_parallel_size=2"),
        ({"moe_aux_loss_coeff": 0.1}, "moe_aux_loss_coeff=0.1 cannot be compared"),
        ({"longest": 2}, "longest=2 must be at least 3"),
    ],
)
def test_mistakes_of_a_comparison(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    base = {"pretrain": write_model(tmp_path / "model"), "num_gpus_per_node": 2}
    assert check_parity(from_dict(ParityConfig, base)) == []
    derived = {"pretrain": base["pretrain"], "tensor_model_parallel_size": 2, "context_parallel_size": 2}
    assert check_parity(from_dict(ParityConfig, derived)) == []
    derived |= {"num_gpus_per_node": 2}
    assert "num_gpus_per_node=2 makes 2 ranks, no multiple" in only(check_parity(from_dict(ParityConfig, derived)))
    assert said in only(check_parity(from_dict(ParityConfig, base | changes)))


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({}, 1),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3, "context_parallel_size": 5}, 30),
        ({"expert_model_parallel_size": 4}, 4),
        ({"expert_model_parallel_size": 2, "tensor_model_parallel_size": 3}, 6),  # ETP is as TP
        ({"expert_model_parallel_size": 3, "expert_tensor_parallel_size": 1, "tensor_model_parallel_size": 2}, 6),
        ({"expert_model_parallel_size": 4, "context_parallel_size": 6, "pipeline_model_parallel_size": 5}, 60),
        ({"tensor_model_parallel_size": 2, "num_gpus_per_node": 8}, 8),
    ],
    ids=str,
)
def test_a_comparison_takes_as_few_ranks_as_the_layout_holds(layout: dict[str, Any], ranks: int) -> None:
    config = from_dict(ParityConfig, {"pretrain": "x", **layout})
    assert config.world_size == ranks
    assert world_errors("", ranks, config.layout, 8 * ranks) == []
    fewer = [n for n in range(1, ranks) if not world_errors("", n, config.layout, 8 * ranks)]
    assert fewer == [] or "num_gpus_per_node" in layout


# One change, and what the single resulting mistake must say: its key, and the numbers that matter.
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretrain": "/nowhere"}, "pretrain=/nowhere is not a local directory"),
        ({"tokenizer": "/nowhere"}, "tokenizer=/nowhere is not a local directory"),
        (
            {"pipeline_model_parallel_size": 4, "actor_num_gpus_per_node": 4},
            "pipeline_model_parallel_size=4 does not divide num_hidden_layers=6",
        ),
        ({"sequence_parallel": True}, "sequence_parallel=True needs tensor_model_parallel_size"),
        (
            {"context_parallel_size": 2, "actor_num_gpus_per_node": 2, "share_prompt_prefix": True},
            "share_prompt_prefix=True does not work with context_parallel_size=2",
        ),
        ({"num_virtual_stages_per_pipeline_rank": 3}, "num_virtual_stages_per_pipeline_rank=3 needs pipeline"),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "actor_num_gpus_per_node": 2,
            },
            "x num_virtual_stages_per_pipeline_rank=2 does not divide num_hidden_layers=6",
        ),
        ({"decoder_first_pipeline_num_layers": 2}, "has no effect with pipeline_model_parallel_size=1"),
        (
            {
                "pipeline_model_parallel_size": 3,
                "decoder_last_pipeline_num_layers": 1,
                "actor_num_gpus_per_node": 3,
            },
            "decoder_last_pipeline_num_layers=1 leaves 5 of num_hidden_layers=6",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "decoder_first_pipeline_num_layers": 4,
                "decoder_last_pipeline_num_layers": 1,
                "actor_num_gpus_per_node": 2,
            },
            "leaves 1 of num_hidden_layers=6",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "decoder_first_pipeline_num_layers": 3,
                "num_virtual_stages_per_pipeline_rank": 2,
                "actor_num_gpus_per_node": 2,
            },
            "does not divide the stages' depths [3, 3]",
        ),
        ({"expert_model_parallel_size": 2, "actor_num_gpus_per_node": 2}, "pretrain has no experts"),
        ({"overlap_param_gather": True}, "overlap_param_gather=True needs"),
        (
            {"optimizer_cpu_offload": True, "use_distributed_optimizer": False},
            "optimizer_cpu_offload=True needs use_distributed_optimizer",
        ),
        ({"ref_reward_offload": False, "init_kl_coef": 0.0}, "ref_reward_offload=False is ignored (no reference"),
        ({"ref_reward_offload": False, "lora_rank": 4}, "ref_reward_offload=False is ignored (no reference"),
        ({"optimizer_offload_fraction": 0.5}, "optimizer_offload_fraction=0.5 is ignored without"),
        ({"overlap_cpu_optimizer_d2h_h2d": True}, "overlap_cpu_optimizer_d2h_h2d=True is ignored without"),
        ({"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.0}, "optimizer_offload_fraction=0.0"),
        (
            {"critic_tensor_model_parallel_size": 8, "critic_num_gpus_per_node": 8},
            "critic_tensor_model_parallel_size=8 does not divide num_key_value_heads=4",
        ),
        ({"critic_pipeline_model_parallel_size": 2}, "makes 1 ranks, no multiple of critic_tensor_model_parallel_size"),
        (
            {
                "advantage_estimator": "reinforce",
                "critic_pipeline_model_parallel_size": 2,
            },
            "critic_pipeline_model_parallel_size=2 is ignored with advantage_estimator=reinforce",
        ),
        ({"tensor_model_parallel_size": 2, "actor_num_gpus_per_node": 3}, "makes 3 ranks, no multiple of"),
        (
            {"tensor_model_parallel_size": 2, "actor_num_gpus_per_node": 2, "critic_num_gpus_per_node": 1},
            "critic_num_gpus_per_node=1 makes 1",
        ),
        (
            {"actor_num_gpus_per_node": 4, "global_batch_size": 2},
            "global_batch_size=2 is below the 4 data-parallel ranks",
        ),
        (
            {"global_batch_size": 48},
            "global_batch_size=48 does not divide rollout_batch_size=128 x n_samples_per_prompt=1 = 128",
        ),
        ({"global_batch_size": 256}, "global_batch_size=256"),
        (
            {"n_samples_per_prompt": 3, "global_batch_size": 128, "share_prompt_prefix": True},
            "share_prompt_prefix=True",
        ),
        ({"recompute_granularity": "full", "recompute_method": "uniform"}, "recompute_num_layers=None"),
        ({"recompute_granularity": "selective", "recompute_num_layers": 1}, "recompute_num_layers=1 is ignored"),
        ({"recompute_method": "block"}, "recompute_method=block is ignored"),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 7},
            "recompute_num_layers=7 is above the 6 layers",
        ),
        ({"vllm_tensor_parallel_size": 3}, "vllm_tensor_parallel_size=3"),
        ({"generate_max_len": 33}, "prompt_max_len + generate_max_len = 65 is above max_position_embeddings=64"),
        ({"max_tokens_per_micro_batch": 63}, "max_tokens_per_micro_batch=63 is below"),
        ({"temperature": 0}, "temperature=0.0 must be above 0"),
        ({"top_p": 0.0, "top_k": 9}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_k": -2}, "top_k=-2 must be -1 or more"),
        ({"min_p": 1.0, "top_k": 9}, "min_p=1.0 must be from 0 to below 1"),
        ({"top_p": 0.5}, "top_p=0.5 and min_p=0.0 need top_k"),
        ({"min_p": 0.1, "init_kl_coef": 0, "max_epochs": 2}, "top_p=1.0 and min_p=0.1 need top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 is not offered"),
        ({"advantage_estimator": "rloo"}, "n_samples_per_prompt=1 with advantage_estimator=rloo"),
        ({"advantage_estimator": "group_norm"}, "n_samples_per_prompt=1"),
        ({"advantage_estimator": "dr_grpo"}, "n_samples_per_prompt=1"),
        ({"advantage_estimator": "reinforce_baseline"}, "n_samples_per_prompt=1"),
        (
            {"actor_num_nodes": 2, "tensor_model_parallel_size": 2},
            "actor_num_gpus_per_node=1 is no multiple of tensor_model_parallel_size=2 (with actor_num_nodes=2",
        ),
        (
            {"critic_num_nodes": 2, "critic_num_gpus_per_node": 3, "critic_tensor_model_parallel_size": 2},
            "critic_num_gpus_per_node=3 is no multiple of critic_tensor_model_parallel_size=2 (with critic_num_nodes=2",
        ),
        ({"ray": False, "critic_num_nodes": 3}, "critic_num_nodes=3 needs Ray (ray=False"),
        ({"ray": False, "ray_address": "10.0.0.1:6379"}, "ray_address=10.0.0.1:6379 is ignored with ray=False"),
        (
            {"advantage_estimator": "reinforce", "critic_pipeline_model_parallel_size": 2},
            "critic_pipeline_model_parallel_size=2 is ignored",
        ),
        ({"advantage_estimator": "reinforce", "critic_pretrain": "."}, "critic_pretrain=. is ignored"),
        ({"advantage_estimator": "reinforce", "freezing_actor_steps": 2}, "freezing_actor_steps=2"),
        (
            {"freezing_actor_steps": 99, "train_iters": 99},
            "freezing_actor_steps=99 leaves none of train_iters=99 steps",
        ),
        ({"ptx_coef": 0.5}, "ptx_coef=0.5 is ignored without pretrain_data"),
        ({"pretrain_split": "other"}, "pretrain_split=other is ignored without pretrain_data"),
        ({"pretrain_data_probs": "0.5"}, "pretrain_data_probs=0.5 is ignored without pretrain_data"),
        ({"pretrain_data": ".", "ptx_coef": 0}, "ptx_coef=0.0 must be above 0"),
        ({"pretrain_data": ".,.", "pretrain_data_probs": "1"}, "has 1 numbers for the 2 data sets of pretrain_data"),
        ({"pretrain_data": "/nowhere"}, "pretrain_data=/nowhere does not exist"),
        ({"ema_decay": 0.5}, "ema_decay=0.5 is ignored with enable_ema=False"),
        ({"advantage_estimator": "reinforce", "save_value_network": True}, "only gae trains a critic"),
        ({"overlong_buffer_len": 33, "prompt_max_len": 32}, "overlong_buffer_len=33 is above generate_max_len=32"),
        ({"overlong_buffer_len": 0}, "overlong_buffer_len=0 must be at least 1"),
        ({"overlong_penalty_factor": 2.0}, "overlong_penalty_factor=2.0 is ignored without overlong_buffer_len"),
        ({"dynamic_filtering": True}, "dynamic_filtering=True with n_samples_per_prompt=1"),
        ({"dynamic_filtering_max_rounds": 2}, "dynamic_filtering_max_rounds=2 is ignored without dynamic_filtering"),
        (
            {"dynamic_filtering": True, "n_samples_per_prompt": 2, "dynamic_filtering_reward_range": (1.0, 1.0)},
            "dynamic_filtering_reward_range=(1.0, 1.0) must be the lowest mean and then a higher one",
        ),
        ({"num_episodes": 0}, "num_episodes=0 must be at least 1"),
        (
            {"advantage_estimator": "dr_grpo", "n_samples_per_prompt": 2, "loss_aggregation": "sequence"},
            "loss_aggregation=sequence is ignored with advantage_estimator=dr_grpo",
        ),
        (
            {"advantage_estimator": "reinforce", "critic_loss_aggregation": "sequence"},
            "critic_loss_aggregation=sequence is ignored",
        ),
        ({"min_result_fraction": 1.5}, "min_result_fraction=1.5 must be from 0 to 1"),
        ({"max_untrained_steps": 0}, "max_untrained_steps=0 must be at least 1"),
        ({"kl_target": 6, "kl_horizon": 25}, "kl_horizon=25 with 128 samples a step (one step could take the KL"),
        ({"kl_target": 6, "init_kl_coef": 0}, "kl_target=6.0 needs init_kl_coef"),
        ({"kl_target": 6, "use_kl_loss": True, "kl_estimator": "k2"}, "kl_target=6.0 with use_kl_loss=True"),
        ({"use_kl_loss": True, "init_kl_coef": 0, "kl_estimator": "k3"}, "use_kl_loss=True needs init_kl_coef"),
        ({"use_kl_loss": True}, "kl_estimator=k1 with use_kl_loss=True"),
        ({"tis_cap": 3}, "tis_cap=3.0 is ignored with use_tis=None and bf16=False: set use_tis"),
        ({"bf16": True, "use_tis": False, "tis_cap": 3}, "tis_cap=3.0 is ignored with use_tis=False and bf16=True"),
        ({"tis_mask_range": [0.5, 5]}, "tis_mask_range=0.5 5.0 is ignored with use_tis=None and bf16=False"),
        (
            {"bf16": True, "tis_cap": 3, "tis_mask_range": [0.5, 5]},
            "tis_cap=3.0 is ignored with tis_mask_range=0.5 5.0: leave one of them out",
        ),
        ({"use_tis": True, "tis_mask_range": [1.5, 5]}, "tis_mask_range=1.5 5.0 must be a bound from 0 to below 1"),
        ({"use_tis": True, "tis_cap": 0.5}, "tis_cap=0.5 must be at least 1"),
        ({"logprob_kl_budget": 0}, "logprob_kl_budget=0.0 must be above 0"),
        ({"gpu_memory_gib": 0}, "gpu_memory_gib=0.0 must be above 0"),
        ({"dual_clip": 1}, "dual_clip=1.0 must be above 1"),
        ({"eps_clip": 0}, "eps_clip=0.0"),
        ({"eps_clip_high": 1}, "eps_clip_high=1.0"),
        ({"reward_clip_range": [1, -1]}, "reward_clip_range=1.0 -1.0"),
        ({"adam_beta2": 1}, "adam_beta2=1.0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
        ({"train_iters": -1}, "train_iters=-1"),
        ({"save_interval": 0}, "save_interval=0"),
        ({"eval_interval": 5}, "eval_interval=5 has nothing to evaluate on: set eval_data"),
        ({"eval_split": "test"}, "eval_split=test has nothing to evaluate on: set eval_data"),
        ({"eval_n_samples_per_prompt": 4}, "eval_n_samples_per_prompt=4 has nothing to evaluate on: set eval_data"),
        ({"eval_data": ".", "eval_n_samples_per_prompt": -1}, "eval_n_samples_per_prompt=-1 must be 0 or more"),
        (
            {"eval_data": ".", "eval_temperature": 0.7},
            "eval_temperature=0.7 is ignored with eval_n_samples_per_prompt=0",
        ),
        (
            {"eval_data": ".", "eval_temperature": 0.0, "eval_n_samples_per_prompt": 2},
            "eval_temperature=0.0 must be above 0",
        ),
        ({"best_metric": "eval/accuracy"}, "best_metric=eval/accuracy has nothing to evaluate on: set eval_data"),
        ({"eval_data": ".", "best_metric_mode": "min"}, "best_metric_mode=min is ignored without best_metric"),
        ({"use_wandb": True}, "WANDB_API_KEY"),
        ({"reward_rule": None}, "reward_function=None and reward_rule=None"),
        ({"reward_rule": "format"}, "reward_format=None"),
        ({"reward_rule": "format", "reward_format": "("}, "reward_format='(' is not a regular expression"),
        ({"reward_format": "x"}, "reward_format='x' is ignored"),
        ({"reward_rule": None, "reward_function": "/nowhere.py"}, "reward_function=/nowhere.py is not a Python file"),
        ({"reward_rule": None, "reward_function": "/bin/sh"}, "reward_function=/bin/sh is not a Python file"),
        ({"reward_env": ["PATH", "NO_SUCH_NAME"]}, "reward_env=NO_SUCH_NAME is not a variable of this environment"),
        ({"remote_rm_url": ["ftp://a/b"]}, "remote_rm_url=ftp://a/b is no http or https address: set http://HOST"),
        ({"remote_rm_url": ["a.example:5000/b"]}, "remote_rm_url=a.example:5000/b is no http or https address"),
        ({"remote_rm_url": ["http:///b"]}, "remote_rm_url=http:///b is no http or https address"),
        ({"remote_rm_url": ["http://a:99999/b"]}, "remote_rm_url=http://a:99999/b is no address (Port out of range"),
        ({"remote_rm_url": ["http://a/b,http://[::1/b"]}, "remote_rm_url=http://[::1/b is no address (Invalid IPv6"),
        ({"remote_rm_url": ["http://me:pw@a/b"]}, "remote_rm_url: an address of a holds a password (other users can"),
        ({"remote_rm_url": ["http://a:5"]}, "remote_rm_url=http://a:5 names no path: set http://a:5/get_reward, or"),
        ({"remote_rm_url": ["a.py", "b.py"]}, "remote_rm_url=a.py b.py with reward_function=None (one reward function"),
        ({"remote_rm_concurrency": 2}, "remote_rm_concurrency=2 is ignored without remote_rm_url"),
        ({"remote_rm_url": ["http://a/"], "remote_rm_concurrency": 0}, "remote_rm_concurrency=0 must be at least 1"),
        ({"remote_rm_url": ["http://a/"], "remote_rm_max_retries": -1}, "remote_rm_max_retries=-1 must be 0 or more"),
        ({"max_no_result_fraction": 1.5}, "max_no_result_fraction=1.5 must be from 0 to 1"),
        ({"tokenizer_chat_template": "{{ messages }}"}, "tokenizer_chat_template is ignored"),
        ({"input_template": "no place"}, "input_template='no place'"),
        ({"input_template": "{} {x}"}, "input_template='{} {x}'"),
        (
            {"input_template": "{}", "apply_chat_template": True, "tokenizer_chat_template": "x"},
            "input_template='{}' with apply_chat_template=True",
        ),
        ({"prompt_data": "/nowhere.jsonl"}, "prompt_data=/nowhere.jsonl does not exist"),
        ({"eval_data": "/nowhere.jsonl"}, "eval_data=/nowhere.jsonl does not exist"),
        ({"load": "/nowhere"}, "load=/nowhere"),
    ],
)
def test_one_mistake(check: Check, changes: dict[str, Any], said: str) -> None:
    assert said in only(check(**changes))


def test_tensor_parallel_sizes_that_would_do_are_listed(check: Check) -> None:
    errors = check(tensor_model_parallel_size=3, actor_num_gpus_per_node=3)
    assert errors == [  # 3 divides the width 48, but neither kind of head
        f"tensor_model_parallel_size=3 does not divide num_{kind}_heads={number} of pretrain (heads and "
        "matrices are split over TP): use 1, 2 or 4"
        for kind, number in (("attention", 8), ("key_value", 4))
    ]


def test_smollm2_takes_tensor_parallel_size_1_or_3(check: Check, tmp_path: Path) -> None:
    model = write_model(tmp_path / "smollm2", num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536)
    assert all(
        "use 1 or 3" in error
        for error in check(pretrain=model, tensor_model_parallel_size=2, actor_num_gpus_per_node=2)
    )
    assert check(pretrain=model, tensor_model_parallel_size=3, actor_num_gpus_per_node=3) == []


@pytest.mark.parametrize(("size", "is_sound"), [(1, True), (2, True), (4, True), (8, True), (3, False), (16, False)])
def test_vllm_copies_kv_heads_where_there_are_fewer_than_ranks(check: Check, size: int, is_sound: bool) -> None:
    assert (check(vllm_tensor_parallel_size=size) == []) is is_sound


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "it has no config.json: give the directory of a"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "holds no JSON object"),
    ],
)
def test_broken_checkpoints(check: Check, tmp_path: Path, break_it: Callable[[Path], object], said: str) -> None:
    break_it(tmp_path / "model")
    message = only(check())
    assert said in message and message.startswith("pretrain=")


def test_the_critic_may_be_a_reward_model_with_the_same_tokens(check: Check, tmp_path: Path) -> None:
    head = {"architectures": ["LlamaForSequenceClassification"]}
    assert check(critic_pretrain=write_model(tmp_path / "reward", **head)) == []
    other = write_model(tmp_path / "other", tokenizer=TOKENIZER | {"model": {"vocab": {"a": 0}}}, **head)
    message = only(check(critic_pretrain=other))
    assert message.startswith("critic_pretrain=") and "2 tokens" in message and "3 tokens" in message
    assert (
        "layers=5 of critic_pretrain"
        in check(
            critic_pretrain=write_model(tmp_path / "odd", num_hidden_layers=5),
            pipeline_model_parallel_size=2,
            actor_num_gpus_per_node=2,
        )[0]
    )


def test_the_critic_must_know_every_token_of_the_actor(check: Check, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", vocab_size=2)
    message = only(check(critic_pretrain=small))
    assert message.startswith(f"critic_pretrain={small} has vocab_size=2, less than vocab_size=3 of pretrain")
    assert check(critic_pretrain=write_model(tmp_path / "large", vocab_size=4)) == []


def test_a_file_where_the_text_itself_is_wanted(check: Check, tmp_path: Path) -> None:
    for name in ("{}.txt", "pattern"):
        (tmp_path / name).write_text("Q: {}")
    said = only(check(input_template=str(tmp_path / "{}.txt")))
    assert said.startswith(f"input_template={tmp_path / '{}.txt'} is a file, and input_template is the text itself")
    said = only(check(reward_rule="format", reward_format=str(tmp_path / "pattern")))
    assert said.startswith(f"reward_format={tmp_path / 'pattern'} is a file")
    assert check(reward_rule="format", reward_format="a" * 9999) == []


def test_someone_scores(check: Check, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("reward_func = print\n")
    assert check(reward_function=str(tmp_path / "reward.py")) == []  # beside a rule: the sum is the reward
    assert "reward_rule=None (nothing scores)" in only(check(reward_rule=None))


@pytest.mark.parametrize(
    ("url", "refused"),
    [
        ("http://10.1.2.3:5000/get_reward", True),
        ("http://rewards.example/get_reward", True),
        ("http://127.0.0.1.rewards.example/get_reward", True),
        ("https://rewards.example/get_reward", False),
        ("http://127.0.0.1:5000/get_reward", False),
        ("http://[::1]:5000/get_reward", False),
        ("http://LocalHost/get_reward", False),
    ],
)
def test_a_token_crosses_no_network_in_the_open(
    check: Check, monkeypatch: pytest.MonkeyPatch, url: str, refused: bool
) -> None:
    given = {"reward_rule": None, "remote_rm_url": [f"http://127.0.0.1/a,{url}"]}
    monkeypatch.delenv("MEGARLHF_RM_TOKEN", raising=False)
    assert check(**given) == []
    monkeypatch.setenv("MEGARLHF_RM_TOKEN", "secret")
    errors = check(**given)
    assert len(errors) == refused and "secret" not in str(errors)
    assert not refused or errors[0].startswith(f"remote_rm_url={url} would carry the token of MEGARLHF_RM_TOKEN unencr")
    assert check(**given, remote_rm_allow_http=True) == []


def test_what_remote_rm_url_decides() -> None:
    url = "http://127.0.0.1/a"
    assert RewardArguments().resolved() == RewardArguments()
    servers = RewardArguments(remote_rm_url=(url,)).resolved()
    assert (servers.reward_skip_special_tokens, servers.max_no_result_fraction) == (False, 0.1)
    file = RewardArguments(remote_rm_url=("r.py",)).resolved()
    assert file == RewardArguments(reward_function="r.py", reward_skip_special_tokens=False)
    both = RewardArguments(remote_rm_url=(url, "r.py"), max_no_result_fraction=0.7, reward_skip_special_tokens=True)
    assert both.resolved() == replace(both, remote_rm_url=(url,), reward_function="r.py")
    two = RewardArguments(remote_rm_url=("r.py",), reward_function="s.py")
    assert two.resolved().remote_rm_url == ("r.py",) and "r.py with reward_function=s.py" in reward_errors(two)[0]


@pytest.mark.parametrize("name", ["n" * 300, "nul\0byte", "file/inside", "loop"], ids=["long", "nul", "file", "loop"])
@pytest.mark.parametrize("key", ["pretrain", "critic_pretrain", "tokenizer", "prompt_data", "load", "reward_function"])
def test_names_that_the_system_refuses(check: Check, tmp_path: Path, key: str, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    path = str(tmp_path / name)
    without = {"reward_rule": None} if key == "reward_function" else {}
    assert any(error.startswith(f"{key}={path}") for error in check(**without, **{key: path}))


@pytest.mark.parametrize(("name", "value"), [("WANDB_API_KEY", "key"), ("WANDB_MODE", "offline")])
def test_wandb_from_the_environment(check: Check, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert check(use_wandb=True) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_len": 65}, "max_len = 65 is above max_position_embeddings=64"),
        ({"num_gpus_per_node": 3, "tensor_model_parallel_size": 2}, "num_gpus_per_node=3 makes 3 ranks"),
        ({"global_batch_size": 1, "num_gpus_per_node": 2}, "global_batch_size=1 is below the 2"),
        ({"output_key": None}, "output_key=None"),
        ({"multiturn": True}, "multiturn=True needs apply_chat_template"),
        ({"multiturn": True, "apply_chat_template": True, "pretrain_mode": True}, "leave one out"),
        ({"eval_dataset": "/nowhere.csv"}, "eval_dataset=/nowhere.csv"),
        ({"dataset": "Open-Orca/OpenOrca"}, "dataset Open-Orca/OpenOrca --local-dir DIR`, then set dataset=DIR"),
        ({"dataset": "json@/nowhere"}, "dataset=json@/nowhere; /nowhere is not a directory"),
        ({"dataset": "text@."}, "the type before @ is json, csv, parquet, arrow"),
        ({"dataset": ".,/nowhere"}, "dataset=/nowhere does not exist"),
        ({"dataset": ".,"}, "dataset=., has an empty name beside a comma"),
        ({"dataset": ".,.", "dataset_probs": "1.0"}, "has 1 numbers for the 2 data sets"),
        ({"dataset": ".,.", "dataset_probs": "0.5,0"}, "must be positive numbers"),
        ({"dataset": ".,.", "dataset_probs": "0.5 0.5"}, "must be positive numbers"),
        ({"eval_split": "train"}, "eval_split=train is train_split too"),
        ({"eval_split": "1.5"}, "must be above 0 and below 1"),
        ({"eval_split": "0.1", "eval_dataset": "."}, "leave one of them out"),
        ({"eval_interval": 1}, "set eval_dataset or eval_split"),
        ({"ema_decay": 0.5}, "ema_decay=0.5 is ignored with enable_ema=False"),
        ({"learning_rate": -1}, "learning_rate=-1.0"),
    ],
)
def test_one_supervised_mistake(check_sft: Check, changes: dict[str, Any], said: str) -> None:
    assert said in only(check_sft(**changes))


def test_a_sound_supervised_configuration_has_no_mistake(check_sft: Check) -> None:
    assert check_sft() == []


def test_the_launchers_world_size_wins(check_sft: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert check_sft(tensor_model_parallel_size=2, num_gpus_per_node=1) == []
    assert "WORLD_SIZE=4 makes 4 ranks" in check_sft(pipeline_model_parallel_size=3)[0]


def test_a_teacher_fits_the_student_and_the_layout(check_kd: Check, tmp_path: Path) -> None:
    """A teacher of another depth and with further tokens is sound; one that names other tokens, or lacks some, not."""
    assert check_kd() == []
    other = write_model(tmp_path / "other", tokenizer=TOKENIZER | {"model": {"vocab": {"b": 0, "a": 1}}})
    said = only(check_kd(teacher_model=other))
    assert said.startswith(f"teacher_model={other} has a tokenizer of 3 tokens that differs from the 3 tokens of")
    small = write_model(tmp_path / "small", vocab_size=2)
    said = only(check_kd(teacher_model=small))
    assert said.startswith(f"teacher_model={small} has vocab_size=2, less than vocab_size=3 of pretrain")
    odd = write_model(tmp_path / "odd", num_hidden_layers=5)
    said = only(check_kd(teacher_model=odd, pipeline_model_parallel_size=2, num_gpus_per_node=2))
    assert "of teacher_model" in said
    assert only(check_kd(teacher_model="/nowhere")).startswith("teacher_model=/nowhere is not a local directory")
    assert only(check_kd(teacher_top_k=3)).startswith("teacher_top_k=3 is not below vocab_size=3 of pretrain")
    assert only(check_kd(kd_coef=1.5)).startswith("kd_coef=1.5 must be from 0 to 1")
