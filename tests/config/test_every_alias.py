"""Every flag of OpenRLHF that is understood means what it says there. One entry for each alias."""

from typing import Any

import pytest

from megarlhf.config.aliases import ALIASES
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.chat_arguments import ChatConfig
from megarlhf.config.command_line import options_of, parse, to_dict
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.loop_arguments import GenerateConfig
from megarlhf.config.reward_model_arguments import RMConfig
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.supervised_arguments import DPOConfig, SFTConfig

# What parses an alias: the first of these that has what it needs.
PROGRAMS: dict[Any, list[str]] = {
    PPOConfig: ["--pretrain", "m", "--prompt_data", "d", "--save", "s"],
    SFTConfig: ["--pretrain", "m", "--save", "s"],
    RMConfig: ["--pretrain", "m", "--dataset", "d", "--save", "s"],
    DPOConfig: ["--pretrain", "m", "--dataset", "d", "--save", "s"],
    GenerateConfig: ["--pretrain", "m", "--prompt_data", "d", "--output", "o"],
    KDConfig: ["--pretrain", "m", "--teacher_model", "t", "--save", "s"],
    ServeConfig: [],
    ChatConfig: ["--pretrain", "m"],
}
REQUIRED = PROGRAMS[PPOConfig]

# Words of the command line, and what they set. Values differ from every default.
MEANT: dict[str, tuple[str, dict[str, Any]]] = {
    "save_path": ("--save_path there", {"save": "there"}),
    "output_path": ("--output_path there.jsonl", {"output": "there.jsonl"}),
    "dataset": ("--dataset there", {"prompt_data": "there"}),
    "dataset_probs": ("--dataset_probs 0.4,0.6", {"prompt_data_probs": "0.4,0.6"}),
    "dataset_split": ("--dataset_split test", {"prompt_split": "test"}),
    "max_new_tokens": ("--max_new_tokens 44", {"generate_max_len": 44}),
    "best_of_n": ("--best_of_n 45", {"n_samples_per_prompt": 45}),
    "greedy_sampling": ("--greedy_sampling", {"greedy": True}),
    "tp_size": ("--tp_size 46", {"vllm_tensor_parallel_size": 46}),
    "save_steps": ("--save_steps 7", {"save_interval": 7}),
    "eval_steps": ("--eval_steps 8", {"eval_interval": 8}),
    "logging_steps": ("--logging_steps 9", {"log_interval": 9}),
    "train_batch_size": ("--train_batch_size 33", {"global_batch_size": 33}),
    "micro_train_batch_size": ("--micro_train_batch_size 34", {"micro_batch_size": 34}),
    "micro_rollout_batch_size": ("--micro_rollout_batch_size 35", {}),
    "batch_size": ("--batch_size 36", {}),
    "max_norm": ("--max_norm 0.36", {"clip_grad": 0.36}),
    "l2": ("--l2 0.37", {"weight_decay": 0.37}),
    "adam_betas": ("--adam_betas 0.38 0.39", {"adam_beta1": 0.38, "adam_beta2": 0.39}),
    "gradient_checkpointing": (
        "--gradient_checkpointing",
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "gradient_checkpointing_use_reentrant": ("--gradient_checkpointing_use_reentrant", {}),
    "seq_length": ("--seq_length 33", {"max_len": 33}),
    "ring_attn_size": ("--ring_attn_size 4", {"context_parallel_size": 4}),
    "packing_samples": ("--packing_samples", {}),
    "colocate_actor_ref": ("--colocate_actor_ref", {}),
    "colocate_critic_reward": ("--colocate_critic_reward", {}),
    "ref_num_nodes": ("--ref_num_nodes 3", {}),
    "ref_num_gpus_per_node": ("--ref_num_gpus_per_node 3", {}),
    "actor_init_on_gpu": ("--actor_init_on_gpu", {}),
    "vllm_sync_backend": ("--vllm_sync_backend nccl", {}),
    "vllm_sync_with_ray": ("--vllm_sync_with_ray", {}),
    "enable_prefix_caching": ("--enable_prefix_caching", {}),
    "value_head_prefix": ("--value_head_prefix score", {}),
    "vllm_enable_sleep": ("--vllm_enable_sleep", {}),
    "perf": ("--perf", {}),
    "loss": ("--loss logexp", {}),
    "compute_fp32_loss": ("--compute_fp32_loss", {}),
    "virtual_pipeline_model_parallel_size": (
        "--virtual_pipeline_model_parallel_size 5",
        {"num_virtual_stages_per_pipeline_rank": 5},
    ),
    "lr_scheduler": ("--lr_scheduler linear", {"lr_decay_style": "linear", "min_lr_ratio": 0.0}),
    "ring_head_stride": ("--ring_head_stride 2", {}),
    "zero_stage": ("--zero_stage 3", {}),
    "adam_offload": ("--adam_offload", {"optimizer_cpu_offload": True}),
    "use_precision_aware_optimizer": ("--use_precision_aware_optimizer", {}),
    "flash_attn": ("--flash_attn", {}),
    "zpg": ("--zpg 1", {}),
    "disable_trace_cache": ("--disable_trace_cache", {}),
    "grad_accum_dtype": ("--grad_accum_dtype fp32", {}),
    "local_rank": ("--local_rank -1", {}),
    "teacher_offload": ("--teacher_offload", {}),
    "aux_loss_coef": ("--aux_loss_coef 0.41", {"moe_aux_loss_coeff": 0.41}),
    "use_kl_estimator_k3": ("--use_kl_estimator_k3", {"kl_estimator": "k3"}),
}


def test_every_alias_has_an_entry() -> None:
    assert set(MEANT) == {name for name, alias in ALIASES.items() if not alias.refused}


@pytest.mark.parametrize("name", MEANT)
@pytest.mark.parametrize("spelled", ["_", "-"])
def test_what_an_alias_sets_and_that_it_sets_nothing_else(
    name: str, spelled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, values = MEANT[name]
    flag, *rest = words.split()
    needs = ALIASES[name].needs
    program, required = next((p, r) for p, r in PROGRAMS.items() if needs <= options_of(p).keys())
    plain, _ = parse(program, required, "ppo")
    capsys.readouterr()
    config, _ = parse(program, [*required, flag.replace("_", spelled), *rest], "ppo")
    before, after = to_dict(plain), to_dict(config)
    assert {key: after[key] for key in after if after[key] != before[key]} == values
    assert bool(values) or "note: " in capsys.readouterr().err, "a flag without effect says so"


@pytest.mark.parametrize(
    "words", ["--loss ipo", "--loss logexp", "--teacher_offload", "--perf", "--colocate_actor_ref"]
)
def test_a_flag_of_another_program_is_unknown(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(DPOConfig, [*PROGRAMS[DPOConfig], *words.split()], "dpo")
    said, flag = capsys.readouterr().err, words.split()[0]
    assert f"unknown option {flag}; " in said and f"did you mean {flag}?" not in said


def test_another_loss_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(RMConfig, [*PROGRAMS[RMConfig], "--loss", "ipo"], "rm")
    assert "it is one of sigmoid, logexp" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, alias in ALIASES.items() if alias.refused])
@pytest.mark.parametrize("words", [[], ["1"]], ids=["bare", "with a value"])
def test_a_refused_flag_gives_the_reason(name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    program, required = next((p, r) for p, r in PROGRAMS.items() if name not in options_of(p))
    with pytest.raises(SystemExit):
        parse(program, [*required, f"--{name}", *words], "ppo")
    assert f"--{name} is not an option here; {ALIASES[name].refused}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["save_steps", "eval_steps"])
def test_minus_one_is_no_interval(flag: str) -> None:
    field = {"save_steps": "save_interval", "eval_steps": "eval_interval"}[flag]
    config, _ = parse(PPOConfig, [*REQUIRED, f"--{field}", "3", f"--{flag}", "-1"], "ppo")
    assert to_dict(config)[field] is None
