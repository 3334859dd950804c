"""Every flag of OpenRLHF 0.5.3's train_ppo, train_ppo_ray, batch_inference, interactive_chat and serve_rm.

The lists are its parsers', https://github.com/OpenRLHF/OpenRLHF/tree/v0.5.3/openrlhf/cli.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli.batch_inference import REFUSED, UNREAD
from megarlhf.cli.flags import PROGRAMS, main, task_meaning
from megarlhf.config.checks import check_chat, check_ppo
from megarlhf.config.command_line import options_of, parse
from megarlhf.config.openrlhf_flags import OPENRLHF_FLAGS, meaning

TRAIN_PPO = {
    *("save_path", "save_steps", "logging_steps", "eval_steps", "ckpt_path", "max_ckpt_num", "max_ckpt_mem"),
    *("load_checkpoint", "num_episodes", "rollout_batch_size", "micro_rollout_batch_size", "max_epochs"),
    *("prompt_max_len", "generate_max_len", "max_len", "max_samples", "max_norm", "l2", "ptx_coef", "eps_clip"),
    *("value_clip", "lambd", "gamma", "micro_train_batch_size", "train_batch_size", "normalize_reward", "top_p"),
    *("temperature", "freezing_actor_steps", "n_samples_per_prompt", "save_value_network", "actor_learning_rate"),
    *("critic_learning_rate", "lr_warmup_ratio", "kl_target", "init_kl_coef", "use_kl_estimator_k3", "adam_betas"),
    *("reward_clip_range", "seed", "local_rank", "zero_stage", "gradient_checkpointing", "bf16", "enable_ema", "zpg"),
    *("adam_offload", "actor_init_on_gpu", "flash_attn", "aux_loss_coef", "grad_accum_dtype", "disable_trace_cache"),
    *("gradient_checkpointing_use_reentrant", "disable_fast_tokenizer", "advantage_estimator", "load_in_4bit"),
    *("lora_rank", "lora_alpha", "target_modules", "lora_dropout", "pretrain", "reward_pretrain", "remote_rm_url"),
    *("critic_pretrain", "value_head_prefix", "prompt_data", "prompt_data_probs", "prompt_split", "pretrain_data"),
    *("pretrain_data_probs", "pretrain_split", "input_key", "input_template", "apply_chat_template", "use_wandb"),
    *("wandb_org", "wandb_group", "wandb_project", "wandb_run_name", "use_tensorboard"),
}
TRAIN_PPO_RAY = TRAIN_PPO | {
    *("ref_num_nodes", "ref_num_gpus_per_node", "reward_num_nodes", "reward_num_gpus_per_node", "colocate_actor_ref"),
    *("actor_num_nodes", "actor_num_gpus_per_node", "critic_num_nodes", "critic_num_gpus_per_node"),
    *("colocate_critic_reward", "vllm_num_engines", "vllm_tensor_parallel_size", "vllm_sync_backend"),
    *("enable_prefix_caching", "enforce_eager", "packing_samples", "ref_reward_offload", "perf"),
}
BATCH_INFERENCE = {
    *("eval_task", "zero_stage", "local_rank", "bf16", "flash_attn", "disable_fast_tokenizer", "micro_batch_size"),
    *("seed", "pretrain", "value_head_prefix", "dataset", "dataset_probs", "dataset_split", "input_key", "output_key"),
    *("apply_chat_template", "input_template", "max_len", "max_samples", "output_path", "prompt_max_len"),
    *("max_new_tokens", "greedy_sampling", "top_p", "temperature", "repetition_penalty", "best_of_n"),
    *("post_processor", "tp_size", "max_num_seqs", "enable_prefix_caching", "iter", "rollout_batch_size"),
    *("normalize_reward", "reward_template", "enable_csft", "csft_prompt"),
}
INTERACTIVE_CHAT = {
    *("bf16", "flash_attn", "disable_fast_tokenizer", "load_in_4bit", "pretrain", "max_len", "greedy_sampling"),
    *("top_p", "temperature", "repetition_penalty", "input_template", "apply_chat_template", "ta_prompt"),
    *("enable_csft", "csft_prompt"),
}
SERVE_RM = {
    *("reward_pretrain", "normalize_reward", "value_head_prefix", "max_len", "port", "host", "load_in_4bit", "bf16"),
    *("flash_attn", "disable_fast_tokenizer", "batch_size"),
}
LISTS = {
    "ppo": (TRAIN_PPO_RAY, {"disable_fast_tokenizer", "max_len"}),
    "chat": (INTERACTIVE_CHAT, {"disable_fast_tokenizer", "load_in_4bit"}),
    "serve_rm": (SERVE_RM, {"disable_fast_tokenizer", "load_in_4bit"}),
}
GIVEN = {  # flag -> a value that its parser takes; others are switches
    **{"save_path": "run", "save_steps": "7", "logging_steps": "2", "eval_steps": "-1", "ckpt_path": "checkpoints"},
    **{"max_ckpt_num": "2", "max_ckpt_mem": "1000", "num_episodes": "2", "rollout_batch_size": "64"},
    **{"micro_rollout_batch_size": "4", "max_epochs": "2", "prompt_max_len": "32", "generate_max_len": "16"},
    **{"max_samples": "100", "max_norm": "0.5", "l2": "0.1", "ptx_coef": "0.07", "eps_clip": "0.3"},
    **{"value_clip": "0.3", "lambd": "0.9", "gamma": "0.9", "micro_train_batch_size": "2", "train_batch_size": "64"},
    **{"top_p": "1.0", "temperature": "0.9", "freezing_actor_steps": "2", "n_samples_per_prompt": "2"},
    **{"actor_learning_rate": "1e-5", "critic_learning_rate": "1e-5", "lr_warmup_ratio": "0.1", "kl_target": "6"},
    **{"init_kl_coef": "0.02", "adam_betas": "0.9 0.95", "reward_clip_range": "-5 5", "seed": "7"},
    **{"local_rank": "-1", "zero_stage": "3", "zpg": "1", "aux_loss_coef": "0.01", "grad_accum_dtype": "fp32"},
    **{"advantage_estimator": "gae", "lora_rank": "4", "lora_alpha": "8", "target_modules": "q_proj v_proj"},
    **{"lora_dropout": "0.1", "pretrain": "{}", "reward_pretrain": "{}", "critic_pretrain": "{}"},
    **{"remote_rm_url": "http://127.0.0.1:5000/get_reward", "value_head_prefix": "score"},
    **{"prompt_data": "{}/d.jsonl,{}/e.jsonl", "prompt_data_probs": "0.7,0.3", "prompt_split": "train"},
    **{"pretrain_data": "{}/d.jsonl,{}/e.jsonl", "pretrain_data_probs": "0.7,0.3", "pretrain_split": "train"},
    **{"input_key": "q", "input_template": "Q: {} A: ", "use_wandb": "KEY", "wandb_org": "team"},
    **{"wandb_group": "group", "wandb_project": "project", "wandb_run_name": "name", "use_tensorboard": "board"},
    **{"ref_num_nodes": "1", "ref_num_gpus_per_node": "2", "reward_num_nodes": "1", "reward_num_gpus_per_node": "2"},
    **{"actor_num_nodes": "1", "actor_num_gpus_per_node": "2", "critic_num_nodes": "1"},
    **{"critic_num_gpus_per_node": "2", "vllm_num_engines": "2", "vllm_tensor_parallel_size": "2"},
    **{"vllm_sync_backend": "nccl", "max_len": "512", "repetition_penalty": "1.1", "ta_prompt": "{}/d.jsonl"},
    **{"csft_prompt": "5", "port": "5001", "host": "127.0.0.1", "batch_size": "4"},
}
APART = {"input_template", "ta_prompt"}  # they contradict a chat template
CHECKS: dict[str, Callable[[Any], list[str]]] = {"ppo": check_ppo, "chat": check_chat}


def test_the_lists_are_as_long_as_the_parsers() -> None:
    numbers = [len(flags) for flags in (TRAIN_PPO, TRAIN_PPO_RAY, BATCH_INFERENCE, INTERACTIVE_CHAT, SERVE_RM)]
    assert numbers == [80, 98, 37, 15, 11]


@pytest.mark.parametrize("program", LISTS)
def test_every_flag_has_a_meaning(program: str) -> None:
    flags, refused = LISTS[program]
    assert set(OPENRLHF_FLAGS[program]) == flags and len(OPENRLHF_FLAGS[program]) == len(flags)
    options = options_of(PROGRAMS[program])
    for flag in flags:
        assert meaning(flag, options).startswith("refused: ") is (flag in refused), flag


@pytest.mark.parametrize("task", ["generate", "rm"])
def test_every_flag_of_batch_inference_has_a_meaning(task: str) -> None:
    assert set(OPENRLHF_FLAGS["batch_inference"]) == BATCH_INFERENCE
    for flag in BATCH_INFERENCE:
        refused = flag in REFUSED[task] or flag == "disable_fast_tokenizer"
        assert task_meaning(flag, task).startswith("refused: ") is refused, flag
        assert task_meaning(flag, task).endswith("; no effect") is (flag in UNREAD[task].keys() - REFUSED[task]), flag


@pytest.mark.parametrize("program", LISTS)
def test_every_flag_is_taken(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All on one line, and what contradicts another by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "KEY")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 42, "mean": 0.5, "std": 1.5}))
    for name in ("d", "e"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    flags, refused = LISTS[program]

    def errors(given: set[str], *more: str) -> list[str]:
        words = list(more)
        for flag in sorted(given):
            text = GIVEN.get(flag, "")
            value = [text] if flag == "input_template" else text.replace("{}", str(tmp_path)).split()
            words += [f"--{flag}", *value]
        return CHECKS.get(program, lambda config: [])(parse(PROGRAMS[program], words, program)[0])

    taken = flags - refused
    assert errors(taken - APART) == []
    needed = taken & {"pretrain", "prompt_data", "save_path", "reward_pretrain"}
    for flag in APART & taken:
        assert errors(needed | {flag}) == []
    for flag in refused:
        with pytest.raises(SystemExit):
            errors(needed, f"--{flag}", *GIVEN.get(flag, "").split())


def test_train_ppo_without_a_critic_or_a_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "d.jsonl").write_text("{}\n")
    line = f"--pretrain {tmp_path} --prompt_data {tmp_path}/d.jsonl --save_path run --remote_rm_url http://[::1]:5/a"
    for estimator in ("reinforce", "rloo"):
        words = [*line.split(), "--advantage_estimator", estimator, "--n_samples_per_prompt", "4"]
        assert check_ppo(parse(PROGRAMS["ppo"], words, "ppo")[0]) == []


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "batch_inference"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "train_ppo and train_ppo_ray of OpenRLHF, megarlhf ppo:" in said
    assert any(line.split()[:1] == ["--ref_num_nodes"] and "in the actor's processes" in line for line in said)
    assert any(line.split()[:1] == ["--max_len"] and "refused: set --prompt_max_len" in line for line in said)
    assert any(line.split() == ["--best_of_n", "--n_samples_per_prompt"] for line in said)
    assert any(line.split() == ["--pretrain", "--reward_pretrain"] for line in said)
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} of OpenRLHF" in printed for name in ("train_sft", "interactive_chat", "serve_rm", "train_kd"))
