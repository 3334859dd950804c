"""Every flag of OpenRLHF 0.5.3's supervised programs has a meaning here. The lists are its parsers'."""

import json
from pathlib import Path

import pytest

from megarlhf.cli.flags import SUPERVISED, main
from megarlhf.config.checks import check_supervised
from megarlhf.config.command_line import options_of, parse
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


REFUSED = {"disable_fast_tokenizer"}
SWITCHES = {
    *("load_checkpoint", "gradient_checkpointing", "gradient_checkpointing_use_reentrant", "bf16", "adam_offload"),
    *("flash_attn", "disable_trace_cache", "packing_samples", "apply_chat_template", "pretrain_mode", "margin_loss"),
    *("compute_fp32_loss", "ref_offload", "teacher_offload", "ipo", "load_in_4bit"),
}
GIVEN = {  # flag -> a value that its parser takes; others are switches
    **{"save_path": "run", "save_steps": "7", "logging_steps": "2", "eval_steps": "5", "ckpt_path": "checkpoints"},
    **{"max_ckpt_num": "2", "max_ckpt_mem": "1000", "max_norm": "0.5", "seed": "7", "local_rank": "0"},
    **{"zero_stage": "3", "zpg": "1", "grad_accum_dtype": "fp32", "learning_rate": "1e-5", "lr_warmup_ratio": "0.1"},
    **{"l2": "0.1", "adam_betas": "0.9 0.95", "aux_loss_coef": "0.01", "max_epochs": "3"},
    **{"micro_train_batch_size": "2", "train_batch_size": "64", "lora_rank": "4", "lora_alpha": "8"},
    **{"target_modules": "q_proj v_proj", "lora_dropout": "0.1", "use_wandb": "KEY", "wandb_org": "team"},
    **{"wandb_group": "group", "wandb_project": "project", "wandb_run_name": "name", "use_tensorboard": "board"},
    **{"dataset": "{}/d.jsonl,{}/e.jsonl", "dataset_probs": "0.7,0.3", "train_split": "train", "eval_split": "test"},
    **{"max_samples": "100", "max_len": "64", "pretrain": "{}", "ring_attn_size": "1", "ring_head_stride": "2"},
    **{"lr_scheduler": "cosine_with_min_lr", "input_key": "q", "output_key": "a", "prompt_key": "p"},
    **{"chosen_key": "c", "rejected_key": "r", "label_key": "l", "tokenizer_chat_template": "{{ messages }}"},
    **{"value_head_prefix": "score", "loss": "sigmoid", "ref_pretrain": "{}", "beta": "0.2", "label_smoothing": "0.1"},
    **{"nll_loss_coef": "0.2", "desirable_loss_weight": "2", "undesirable_loss_weight": "3", "teacher_model": "{}"},
    **{"kd_coef": "0.5", "placeholder_token": "z", "reward_tokens": "y n", "input_template": "Q: {} A: "},
}
APART = {"input_template", "ipo", "ref_pretrain"}  # they contradict a chat template, label_smoothing, adapters


@pytest.mark.parametrize("program", SUPERVISED)
def test_every_flag_has_a_meaning(program: str) -> None:
    assert set(OPENRLHF_FLAGS[program]) == COMMON | OWN[program]
    options = options_of(SUPERVISED[program])
    for flag in COMMON | OWN[program]:
        assert meaning(flag, options).startswith("refused: ") is (flag in REFUSED)


@pytest.mark.parametrize("program", SUPERVISED)
def test_every_flag_is_taken(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All on one line, and what contradicts another by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "KEY")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 42}))
    for name in ("d", "e"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    taken = (COMMON | OWN[program]) - REFUSED
    assert taken <= GIVEN.keys() | SWITCHES

    def errors(flags: set[str], *more: str) -> list[str]:
        words = list(more)
        for flag in sorted(flags):
            value = GIVEN.get(flag, "")
            is_text = flag in ("input_template", "tokenizer_chat_template")
            words += [f"--{flag}", *([value] if is_text else value.replace("{}", str(tmp_path)).split())]
        return check_supervised(parse(SUPERVISED[program], words, program)[0])

    assert errors(taken - APART) == []
    needed = {"pretrain", "dataset", "save_path", "output_key", "teacher_model", "placeholder_token", "prompt_key"}
    for flag in APART & taken:
        assert errors((needed & taken) | {flag}) == []
    for flag in REFUSED:
        with pytest.raises(SystemExit):
            errors(needed & taken, f"--{flag}")


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "dpo"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        sum(line.split()[:1] == ["--train_batch_size"] and line.endswith("--global_batch_size") for line in said) == 2
    )
    assert any(line.split()[:1] == ["--disable_fast_tokenizer"] and "refused: " in line for line in said)
    assert any(line.split()[:1] == ["--use_tensorboard"] and "<save>/tensorboard" in line for line in said)
    assert any(line.split()[:1] == ["--load_in_4bit"] and "without double quantisation" in line for line in said)
    assert any(line.split()[:1] == ["--eval_split"] and "the default here is no evaluation" in line for line in said)
    assert any(line.split()[:1] == ["--eval_steps"] and "once an epoch" in line for line in said)
    assert any(line.split()[:1] == ["--input_template"] and "Assistant" in line for line in said)
    assert not any(line.startswith("train_kto") for line in said)
    assert main(["nothing"]) == 2
    assert "no program 'nothing'" in capsys.readouterr().err
