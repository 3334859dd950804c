"""The flags of OpenRLHF 0.5.3's supervised programs, and what each means here."""

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

OPENRLHF_FLAGS: dict[str, tuple[str, ...]] = {  # our command -> flags of train_<command>
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

_NOTES = {  # what differs, also where a command leaves the flag out
    "load_in_4bit": "without double quantisation (docs/supervised.md)",
    "eval_split": "where OpenRLHF's default is test, the default here is no evaluation",
    "eval_steps": "-1, once an epoch, is the default here too",
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
