"""The flags of OpenRLHF 0.5.3's programs, and what each means here."""

from collections.abc import Mapping
from typing import Any

from megarlhf.config.aliases import ALIASES, SWITCH_VALUES

_CKPT = "save_path save_steps logging_steps eval_steps ckpt_path max_ckpt_num max_ckpt_mem load_checkpoint"
_SYS = (
    "max_norm gradient_checkpointing gradient_checkpointing_use_reentrant seed local_rank zero_stage bf16 zpg "
    "adam_offload flash_attn grad_accum_dtype disable_trace_cache disable_fast_tokenizer"
)
_OPT = "learning_rate lr_warmup_ratio l2 adam_betas aux_loss_coef max_epochs micro_train_batch_size train_batch_size"
_LORA = "load_in_4bit lora_rank lora_alpha target_modules lora_dropout"
_LOG = "use_wandb wandb_org wandb_group wandb_project wandb_run_name"
_DATA = "dataset dataset_probs train_split eval_split max_samples max_len pretrain"
_RING = "ring_attn_size ring_head_stride"
_ALL = (_CKPT, _SYS, _OPT, _LORA, _LOG, _DATA)
_PAIRS = "packing_samples prompt_key chosen_key rejected_key input_template apply_chat_template"
_CHAT = "input_key output_key input_template apply_chat_template"
_BOARD = "use_tensorboard"

_RL = (
    "num_episodes rollout_batch_size micro_rollout_batch_size max_epochs prompt_max_len generate_max_len max_len "
    "max_samples l2 ptx_coef eps_clip value_clip lambd gamma micro_train_batch_size train_batch_size normalize_reward "
    "top_p temperature freezing_actor_steps n_samples_per_prompt save_value_network actor_learning_rate "
    "critic_learning_rate lr_warmup_ratio kl_target init_kl_coef use_kl_estimator_k3 adam_betas reward_clip_range "
    "enable_ema actor_init_on_gpu aux_loss_coef advantage_estimator pretrain reward_pretrain remote_rm_url "
    "critic_pretrain value_head_prefix prompt_data prompt_data_probs prompt_split pretrain_data pretrain_data_probs "
    "pretrain_split input_key input_template apply_chat_template"
)
_RAY = (  # of train_ppo_ray alone
    "ref_num_nodes ref_num_gpus_per_node reward_num_nodes reward_num_gpus_per_node critic_num_nodes "
    "critic_num_gpus_per_node actor_num_nodes actor_num_gpus_per_node colocate_actor_ref colocate_critic_reward "
    "ref_reward_offload packing_samples vllm_num_engines vllm_tensor_parallel_size vllm_sync_backend "
    "enable_prefix_caching enforce_eager perf"
)
_OTHERS = {
    "batch_inference": "eval_task zero_stage local_rank bf16 flash_attn disable_fast_tokenizer micro_batch_size seed "
    "pretrain value_head_prefix dataset dataset_probs dataset_split input_key output_key apply_chat_template "
    "input_template max_len max_samples output_path prompt_max_len max_new_tokens greedy_sampling top_p temperature "
    "repetition_penalty best_of_n post_processor tp_size max_num_seqs enable_prefix_caching iter rollout_batch_size "
    "normalize_reward reward_template enable_csft csft_prompt",
    "chat": "bf16 flash_attn disable_fast_tokenizer load_in_4bit pretrain max_len greedy_sampling top_p temperature "
    "repetition_penalty input_template apply_chat_template ta_prompt enable_csft csft_prompt",
    "serve_rm": "reward_pretrain normalize_reward value_head_prefix max_len port host load_in_4bit bf16 flash_attn "
    "disable_fast_tokenizer batch_size",
}

OPENRLHF_FLAGS: dict[str, tuple[str, ...]] = {  # our command -> flags of OpenRLHF's program
    name: tuple(" ".join((*_ALL, own)).split())
    for name, own in {
        "sft": f"pretrain_mode lr_scheduler packing_samples tokenizer_chat_template {_CHAT} {_BOARD}",
        "rm": f"value_head_prefix compute_fp32_loss margin_loss loss tokenizer_chat_template {_PAIRS} {_RING} {_BOARD}",
        "dpo": f"ref_pretrain ref_offload beta ipo label_smoothing nll_loss_coef {_PAIRS} {_RING} {_BOARD}",
        "kto": f"ref_offload beta desirable_loss_weight undesirable_loss_weight label_key {_CHAT} {_BOARD}",
        "kd": f"teacher_model teacher_offload kd_coef pretrain_mode lr_scheduler {_CHAT} {_BOARD}",
        "prm": "lr_scheduler placeholder_token reward_tokens packing_samples input_key label_key",
    }.items()
}
OPENRLHF_FLAGS["ppo"] = tuple(" ".join((_CKPT, _SYS, _LORA, _LOG, _BOARD, _RL, _RAY)).split())
OPENRLHF_FLAGS |= {name: tuple(flags.split()) for name, flags in _OTHERS.items()}

_NOTES = {  # what differs, also where a command leaves the flag out
    "load_in_4bit": "without double quantisation (docs/supervised.md)",
    "eval_split": "where OpenRLHF's default is test, the default here is no evaluation",
    "eval_steps": "-1, once an epoch, is the default here too",
    "rollout_batch_size": "where OpenRLHF's default is 512, with Ray 1024, it is 128 here for PPO",
    **dict.fromkeys(
        ("actor_num_gpus_per_node", "critic_num_gpus_per_node", "reward_num_gpus_per_node"),
        "where OpenRLHF's default is 8, it is 1 here for the actor, and as many for the others",
    ),
    **dict.fromkeys(
        ("ref_reward_offload", "ref_offload"), "where OpenRLHF's default is off, it is on here: --no_... keeps them"
    ),
    "vllm_num_engines": "where OpenRLHF's default is none, it is 1 here: vLLM always generates",
    "host": "where OpenRLHF's default is 0.0.0.0, it is 127.0.0.1 here",
    "input_template": r"where OpenRLHF's sft, kto and kd have the default $'User: {}\nAssistant: ', there is none here",
}


def meaning(flag: str, options: Mapping[str, Any]) -> str:
    """What a flag of OpenRLHF means to a program with these options.

    Raises:
        KeyError: nobody has said it.
    """
    notes = [table[flag] for table in (_NOTES, SWITCH_VALUES) if flag in table]
    if flag in options:
        return "; ".join(["the same", *notes])
    alias = ALIASES[flag]
    if alias.refused:
        return f"refused: {alias.refused}"
    if not alias.needs <= options.keys():
        raise KeyError(flag)
    set_to = [f"--{name}" for name in alias.fields] + [f"--{name} {value}" for name, value in alias.settings.items()]
    choices = [
        f"{value} is {' '.join(f'--{name} {text}' for name, text in sets.items())}"
        for value, sets in alias.choices.items()
        if sets
    ] or [" or ".join(alias.choices)]
    return "; ".join(part for part in (" ".join(set_to), *choices, alias.note, *notes) if part)
