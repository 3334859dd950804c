"""The command line: spellings, YAML, aliases, and what it refuses."""

import dataclasses
import inspect
import os
from pathlib import Path

import pytest
import yaml

from megarlhf.config.aliases import ALIASES
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_numbers import LIMITS
from megarlhf.config.command_line import from_dict, options_of, parse, to_dict, to_yaml
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.loop_arguments import GenerateConfig
from megarlhf.config.passed import PREFIXES
from megarlhf.config.reward_model_arguments import RMConfig
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.supervised_arguments import DPOConfig, SFTConfig

PPO = ["--pretrain", "m", "--prompt_data", "p.jsonl", "--save", "run"]
SFT = ["--pretrain", "m", "--dataset", "d.jsonl", "--save", "run"]


def ppo(*flags: str) -> PPOConfig:
    return parse(PPOConfig, [*PPO, *flags], "ppo")[0]


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        ppo(*flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_dashes_underscores_and_equals_signs_are_alike() -> None:
    assert ppo("--tensor-model-parallel-size", "2") == ppo("--tensor_model_parallel_size=2")
    assert ppo("--tensor-model-parallel-size", "2").layout.tensor_model_parallel_size == 2


def test_the_last_flag_wins() -> None:
    assert ppo("--seed", "1", "--seed", "2").model.seed == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--bf16"], True),
        (["--no-bf16"], False),
        (["--no_bf16"], False),
        (["--bf16", "--no-bf16"], False),
        (["--bf16", "False"], False),
        (["--bf16=true"], True),
        ([], False),
    ],
)
def test_switches(flags: list[str], expected: bool) -> None:
    assert ppo(*flags).model.bf16 is expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--share_prompt_prefix"], True),
        (["--no-share-prompt-prefix"], False),
        (["--share_prompt_prefix", "none"], None),
    ],
)
def test_a_switch_with_a_third_state(flags: list[str], expected: bool | None) -> None:
    assert ppo(*flags).batch.share_prompt_prefix is expected


def test_values_that_begin_with_a_dash_or_hold_new_lines() -> None:
    config = ppo("--reward_clip_range", "-3", "3", "--freezing_actor_steps", "-1", "--input_template=--{}\n= ")
    assert config.algorithm.reward_clip_range == (-3.0, 3.0)
    assert config.optimizer.freezing_actor_steps == -1
    assert config.data.input_template == "--{}\n= "


def test_dry_run() -> None:
    assert parse(PPOConfig, [*PPO, "--dry-run"], "ppo")[1] is True
    assert parse(PPOConfig, [*PPO, "--dry_run"], "ppo")[1] is True
    assert parse(PPOConfig, PPO, "ppo")[1] is False


def test_unknown_flags_are_reported_together_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--learning_rate", "1", "--tensor-model-paralel-size", "2", "--fp8")
    assert "--learning_rate; did you mean --actor_learning_rate?" in message
    assert "--tensor-model-paralel-size; did you mean --tensor_model_parallel_size?" in message
    assert "--fp8 is not an option here" in message
    assert "set train_dtype, log_prob_dtype or rollout_dtype" in message


@pytest.mark.parametrize(
    "flags",
    [["--seed", "1", "2"], ["--seed", "one"], ["--seed"], ["--kl_estimator", "k4"], ["--reward_clip_range", "1"]],
)
def test_bad_values_name_the_flag(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert flags[0].replace("_", "-") in refused(capsys, *flags).replace("_", "-")


def test_a_value_without_a_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(PPOConfig, ["stray", *PPO], "ppo")
    assert "stray" in capsys.readouterr().err


def test_missing_required_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(PPOConfig, ["--pretrain", "m"], "ppo")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "prompt_data is missing" in message and "save is missing" in message


def test_a_wandb_key_on_the_command_line_works_with_a_warning_and_is_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "before")
    assert ppo("--use_wandb", "0123secret").logging.use_wandb is True
    message = capsys.readouterr().err
    assert "other users of this machine" in message and "WANDB_API_KEY" in message
    assert "0123secret" not in message
    assert os.environ["WANDB_API_KEY"] == "0123secret"
    assert ppo("--use_wandb", "True").logging.use_wandb is True
    assert os.environ["WANDB_API_KEY"] == "0123secret"


@pytest.mark.parametrize(
    ("name", "style", "least", "warmup"),
    [
        ("cosine_with_min_lr", "cosine", 0.1, 0.03),
        ("cosine", "cosine", 0.0, 0.03),
        ("linear", "linear", 0.0, 0.03),
        ("constant", "constant", 0.1, 0.0),
        ("constant_with_warmup", "constant", 0.1, 0.03),
        ("inverse_sqrt", "inverse-square-root", 0.0, 0.03),
    ],
)
def test_schedules_of_transformers(name: str, style: str, least: float, warmup: float) -> None:
    found = ppo("--lr_scheduler", name).optimizer
    assert (found.lr_decay_style, found.min_lr_ratio, found.lr_warmup_ratio) == (style, least, warmup)


def test_other_schedules_are_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cosine_with_min_lr, cosine, linear" in refused(capsys, "--lr_scheduler", "polynomial")


@pytest.mark.parametrize(("flag", "value", "others"), [("--zpg", "1", ["8"]), ("--grad_accum_dtype", "fp32", ["bf16"])])
def test_the_one_value_that_is_so_here(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, others: list[str]
) -> None:
    assert ppo(flag, value) == ppo() and f"note: {flag}: " in capsys.readouterr().err
    said = refused(capsys, flag, *others)
    assert f"{flag} {others[0]} is not known here (" in said and said.rstrip().endswith(f"it is one of {value}")


def test_flags_of_deepspeed_are_taken_with_what_they_mean_here(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--zero_stage", "3", "--flash_attn", "--ring_head_stride", "2", "--local_rank", "0"]
    assert ppo(*flags) == ppo()
    said = capsys.readouterr().err
    assert all(f"note: {flag}: " in said for flag in flags if flag.startswith("--"))


@pytest.mark.parametrize("other", [{"RANK": "1"}, {"RANK": "0", "MEGARLHF_RENDEZVOUS": "file://place"}])
def test_notes_are_said_once_for_all_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    ppo("--flash_attn")
    assert capsys.readouterr().err.count("note: --flash_attn") == 1
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    ppo("--flash_attn")
    assert capsys.readouterr().err == ""


def test_openrlhf_names() -> None:
    theirs = ["--max_norm", "0.5", "--l2", "0.1", "--train_batch_size", "64", "--micro_train_batch_size", "2"]
    theirs += ["--save_steps", "5", "--eval_steps", "-1", "--logging_steps", "2", "--adam_betas", "0.8", "0.9"]
    theirs += ["--ring_attn_size", "2", "--use_kl_estimator_k3"]
    ours = ["--clip_grad", "0.5", "--weight_decay", "0.1", "--global_batch_size", "64", "--micro_batch_size", "2"]
    ours += ["--save_interval", "5", "--log_interval", "2", "--adam_beta1", "0.8", "--adam_beta2", "0.9"]
    ours += ["--context_parallel_size", "2", "--kl_estimator", "k3"]
    assert ppo(*theirs) == ppo(*ours)


def test_gradient_checkpointing_is_full_recomputation() -> None:
    layout = ppo("--gradient_checkpointing", "--recompute_num_layers", "2").layout
    assert (layout.recompute_granularity, layout.recompute_method, layout.recompute_num_layers) == (
        "full",
        "uniform",
        2,
    )


def test_flags_without_effect_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert ppo("--colocate_actor_ref", "--packing_samples") == ppo()
    notes = capsys.readouterr().err
    assert "--colocate_actor_ref" in notes and "--packing_samples" in notes


@pytest.mark.parametrize("flags", [["--adam_betas", "0.9"], ["--packing_samples", "1"], ["--max_norm"]])
def test_aliases_take_their_number_of_values(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert f"{flags[0]} takes" in refused(capsys, *flags)


def test_every_alias_leads_to_options_that_exist() -> None:
    programs = (PPOConfig, RMConfig, DPOConfig, KDConfig, GenerateConfig, ServeConfig)
    known = {name for program in programs for name in options_of(program)}
    for name, alias in ALIASES.items():
        assert alias.needs <= known, name
        assert alias.needs or alias.note or alias.refused, name


def test_names_are_shared_by_an_option_and_no_alias_of_the_same_program() -> None:
    assert options_of(PPOConfig).keys() & ALIASES.keys() == {"load_in_4bit"}  # refused in chat
    assert options_of(SFTConfig).keys() & ALIASES.keys() == {"max_len", "load_in_4bit", "dataset", "dataset_probs"}


def test_sft_has_its_own_names() -> None:
    config, _ = parse(SFTConfig, [*SFT, "--learning_rate", "1e-4", "--max_len", "64", "--l2", "0.1"], "sft")
    assert (config.optimizer.learning_rate, config.batch.max_len, config.optimizer.weight_decay) == (1e-4, 64, 0.1)


def test_an_alias_for_a_field_that_the_program_lacks_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(SFTConfig, [*SFT, "--use_kl_estimator_k3"], "sft")
    assert "unknown option --use_kl_estimator_k3" in capsys.readouterr().err


def test_yaml_by_group_or_flat_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "layout:\n  tensor-model-parallel-size: 2\nactor_learning_rate: 1e-5\nseed: 7\nsave: a\nbf16: true\n"
    )
    config = ppo("--config", str(file), "--seed", "8", "--no-bf16")
    assert config.layout.tensor_model_parallel_size == 2
    assert config.optimizer.actor_learning_rate == 1e-5  # text in YAML 1.1
    assert config.model.seed == 8
    assert config.model.bf16 is False
    assert config.logging.save == "run"


def test_yaml_may_give_the_required_options(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(ppo("--bf16", "--reward_clip_range", "-1", "1")))
    assert parse(PPOConfig, [f"--config={file}"], "ppo")[0] == ppo("--bf16", "--reward_clip_range", "-1", "1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout_batch_siz: 1", "did you mean rollout_batch_size?"),
        ("layout:\n  max_norm: 1", "write clip_grad"),
        ("zero_stage: 3", "use_distributed_optimizer"),
        ("seed: one", "seed='one' takes int, not 'one'"),
        ("seed: 1.5", "seed=1.5 takes int, not '1.5'"),
        ("seed: null", "seed=None"),
        ("bf16: 1", "bf16=1 takes bool, not '1'"),
        ("seed: true", "seed=True"),
        ("seed: 2024-01-01", "seed=datetime.date(2024, 1, 1) takes int"),
        ("kl_estimator: k4", "kl_estimator='k4'"),
        ("reward_clip_range: [1]", "reward_clip_range=[1]"),
        ("seed: 1\nmodel:\n  seed: 2", "seed is given twice"),
        ("- a", "must hold keys and values"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_bad_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert expected in refused(capsys, "--config", str(file))


def test_a_missing_yaml_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "config=nowhere.yaml" in refused(capsys, "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    "flags", [[], ["--kl_target", "6", "--eps_clip_high", "0.28", "--save_interval", "2", "--bf16"]]
)
def test_dictionaries_and_yaml_round_trip(flags: list[str]) -> None:
    config = ppo(*flags)
    assert from_dict(PPOConfig, to_dict(config)) == config
    assert from_dict(PPOConfig, yaml.safe_load(to_yaml(config))) == config
    assert to_dict(config)["kl_target"] == (6.0 if flags else None)


def test_from_dict_reports_all_mistakes() -> None:
    with pytest.raises(ValueError) as error:
        from_dict(SFTConfig, {"seed": "x", "bathc": 1})
    message = str(error.value)
    assert all(name in message for name in ("seed", "bathc", "pretrain is missing", "save is missing"))


@pytest.mark.parametrize("config_class", [PPOConfig, SFTConfig])
def test_help_has_every_option_by_group(capsys: pytest.CaptureFixture[str], config_class: type) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(config_class, ["--help", "--nonsense"], "prog")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, option in options_of(config_class).items():
        if name in PREFIXES:
            continue  # no flags, but what other programs' options are called in YAML
        assert f"--{name.replace('_', '-')}" in text
        assert f"{option.group.replace('_', '-')} options" in text
    assert "--config" in text and "--dry-run" in text and "--help megatron" in text


@pytest.mark.parametrize("config_class", [PPOConfig, SFTConfig])
def test_fields_are_documented_and_flat_names_unique(config_class: type) -> None:
    names = []
    for group in dataclasses.fields(config_class):
        source = "".join(inspect.getsource(c) for c in group.type.__mro__[:-1])  # inherited fields too
        for field in dataclasses.fields(group.type):
            names.append(field.name)
            declaration = source.split(f"    {field.name}: ", 1)[1].split("\n")
            assert declaration[1].strip().startswith('"""'), field.name
    assert len(names) == len(set(names))
    assert set(names) == set(options_of(config_class))


def test_every_number_has_a_range() -> None:
    # checked by rules of their own
    free = {"dynamic_filtering_reward_range", "reward_clip_range", "reward_weights", "tis_mask_range"}
    for config_class in (PPOConfig, SFTConfig):
        for name, option in options_of(config_class).items():
            is_number = any(kind in str(option.annotation) for kind in ("int", "float"))
            assert not is_number or name in LIMITS or name in free, name


@pytest.mark.parametrize("names", [[], ["A_KEY"], ["A_KEY", "B_KEY", "C_KEY"]])
def test_options_of_any_number_of_values(tmp_path: Path, names: list[str]) -> None:
    assert ppo("--reward_env", *names).reward.reward_env == tuple(names)
    config = ppo("--reward-env", *names)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert parse(PPOConfig, ["--config", str(tmp_path / "c.yaml")], "ppo")[0] == config
    assert from_dict(PPOConfig, to_dict(config)) == config
