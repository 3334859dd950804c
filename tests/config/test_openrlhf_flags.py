"""Every flag of OpenRLHF 0.5.3's supervised programs has a meaning here. The lists are its parsers'."""

import pytest

from megarlhf.cli.flags import PROGRAMS, main
from megarlhf.config.command_line import options_of
from megarlhf.config.openrlhf_flags import OPENRLHF_FLAGS, meaning

COMMON = {
    *("save_path", "save_steps", "logging_steps", "eval_steps", "ckpt_path", "max_ckpt_num", "max_ckpt_mem"),
    *("load_checkpoint", "max_norm", "gradient_checkpointing", "gradient_checkpointing_use_reentrant", "seed"),
    *("local_rank", "zero_stage", "bf16", "zpg", "adam_offload", "flash_attn", "grad_accum_dtype"),
    *("disable_trace_cache", "disable_fast_tokenizer", "learning_rate", "lr_warmup_ratio", "l2", "adam_betas"),
    *("aux_loss_coef", "max_epochs", "micro_train_batch_size", "train_batch_size", "load_in_4bit", "lora_rank"),
    *("lora_alpha", "target_modules", "lora_dropout", "use_wandb", "wandb_org", "wandb_group", "wandb_project"),
    *("wandb_run_name", "dataset", "dataset_probs", "train_split", "eval_split", "max_samples", "max_len", "pretrain"),
}
TENSORBOARD, RING = {"use_tensorboard"}, {"ring_attn_size", "ring_head_stride"}
CHAT = {"input_key", "output_key", "input_template", "apply_chat_template"}
PAIRS = {"packing_samples", "prompt_key", "chosen_key", "rejected_key", "input_template", "apply_chat_template"}
OWN = {
    "sft": {"pretrain_mode", "lr_scheduler", "packing_samples", "tokenizer_chat_template"} | CHAT | TENSORBOARD,
    "rm": {"value_head_prefix", "compute_fp32_loss", "margin_loss", "loss", "tokenizer_chat_template"}
    | (PAIRS | RING | TENSORBOARD),
    "dpo": {"ref_pretrain", "ref_offload", "beta", "ipo", "label_smoothing", "nll_loss_coef"}
    | (PAIRS | RING | TENSORBOARD),
    "kto": {"ref_offload", "beta", "desirable_loss_weight", "undesirable_loss_weight", "label_key"}
    | (CHAT | TENSORBOARD),
    "kd": {"teacher_model", "teacher_offload", "kd_coef", "pretrain_mode", "lr_scheduler"} | CHAT | TENSORBOARD,
    "prm": {"lr_scheduler", "placeholder_token", "reward_tokens", "packing_samples", "input_key", "label_key"},
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_has_a_meaning(program: str) -> None:
    assert set(OPENRLHF_FLAGS[program]) >= COMMON | OWN[program]
    options = options_of(PROGRAMS[program])
    for flag in COMMON | OWN[program]:
        assert meaning(flag, options)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "dpo"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        sum(line.split()[:1] == ["--train_batch_size"] and line.endswith("--global_batch_size") for line in said) == 2
    )
    assert any(line.split()[:1] == ["--max_ckpt_mem"] and "refused: " in line for line in said)
    assert not any(line.startswith("train_kto") for line in said)
    assert main(["nothing"]) == 2
    assert "no program 'nothing'" in capsys.readouterr().err
