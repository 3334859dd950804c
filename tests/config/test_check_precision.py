"""What is refused of phases in FP8, whatever the devices are and on GPUs that do not have it."""

from dataclasses import replace
from typing import Any

import pytest

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_precision import check_node, precision_device_errors, precision_errors
from megarlhf.config.command_line import parse
from megarlhf.config.precision import PrecisionArguments, RLPrecisionArguments, precision_lines

MODEL = {"num_hidden_layers": 6}
PPO = ["--pretrain", "m", "--prompt_data", "p", "--save", "s"]


def found(*flags: str) -> list[str]:
    config = parse(PPOConfig, [*PPO, *flags], "ppo")[0]
    return precision_errors(config, {"pretrain": MODEL})


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--train_dtype", "fp8"),
        ("--train_dtype", "fp32", "--rollout_dtype", "bf16"),
        ("--bf16", "--train_dtype", "bf16", "--rollout_dtype", "fp32"),
        ("--rollout_dtype", "fp8", "--fp8-recipe", "tensorwise", "--fp8_fallback_steps", "3"),
        ("--train_dtype", "fp8", "--log_prob_dtype", "fp8", "--fp8-recipe", "delayed"),
        ("--train_dtype", "fp8", "--bf16", "--fp8-param-gather"),
        ("--train_dtype", "fp8", "--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "2"),
    ],
)
def test_what_may_run(flags: tuple[str, ...]) -> None:
    assert found(*flags) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--train_dtype bf16", "train_dtype=bf16 with bf16=False (weights are fp32"),
        ("--bf16 --log_prob_dtype fp32", "log_prob_dtype=fp32 with bf16=True (weights are bf16"),
        ("--fp8-format e4m3", "fp8_format=e4m3 is ignored without train_dtype=fp8 or log_prob_dtype=fp8"),
        ("--rollout_dtype fp8 --fp8_max_amax 9", "fp8_max_amax=9.0 is ignored without train_dtype=fp8"),
        ("--fp8-recipe delayed", "fp8_recipe=delayed is ignored without a phase in fp8"),
        ("--train_dtype fp8 --fp8-amax-history-len 4", "fp8_amax_history_len=4 is ignored without fp8_recipe=delayed"),
        ("--train_dtype fp8 --num-layers-at-end-in-bf16 2", "is ignored without first_last_layers_bf16"),
        ("--log_prob_dtype fp8 --fp8-recipe delayed", "only training passes move delayed scales on"),
        ("--train_dtype fp8 --fp8-recipe delayed --first-last-layers-bf16", "set another fp8_recipe"),
        (
            "--train_dtype fp8 --fp8-recipe delayed --fp8-amax-history-len 4",
            "fp8_amax_history_len=4 is ignored with fp8_amax_compute_algo=most_recent",
        ),
        ("--train_dtype fp8 --fp8-param-gather", "fp8_param_gather=True needs train_dtype=fp8, bf16"),
        (
            "--train_dtype fp8 --first-last-layers-bf16 --pipeline-model-parallel-size 3 "
            "--num-layers-at-start-in-bf16 3",
            "num_layers_at_start_in_bf16=3 and num_layers_at_end_in_bf16=1 of num_hidden_layers=6 of pretrain (at most "
            "a stage's 2",
        ),
        (
            "--train_dtype fp8 --first-last-layers-bf16 --num-layers-at-start-in-bf16 5",
            "a layer must be left for FP8",
        ),
        ("--train_dtype fp8 --lora_rank 4 --load_in_4bit", "load_in_4bit=True with fp8"),
    ],
)
def test_what_may_not(flags: str, words: str) -> None:
    (error,) = found(*flags.split())
    assert words in error
    assert found() == []


def on_gpu(precision: PrecisionArguments, **changes: Any) -> list[str]:
    given: dict[str, Any] = {"bf16": True, "on_gpu": True, "capability": (9, 0)} | changes
    return precision_device_errors(precision, given.pop("impl", "transformer_engine"), **given)


FP8 = PrecisionArguments(train_dtype="fp8")


@pytest.mark.parametrize(
    ("precision", "changes", "words"),
    [
        (FP8, {"capability": (8, 0)}, "train_dtype=fp8 on GPUs of compute capability 8.0 (fp8_recipe=blockwise needs"),
        (FP8, {"capability": (8, 0)}, "set bf16 for these phases"),
        (FP8, {"capability": (8, 9)}, "set fp8_recipe=tensorwise"),
        (RLPrecisionArguments(rollout_dtype="fp8"), {"capability": (8, 0)}, "rollout_dtype=fp8 on GPUs of"),
        (FP8, {"bf16": False}, "train_dtype=fp8 with bf16=False"),
        (FP8, {"impl": "local"}, "with transformer_impl=local"),
        (replace(FP8, fp8_param_gather=True), {}, "fp8_param_gather=True on GPUs"),
        (replace(FP8, fp8_recipe="delayed"), {"recompute_modules": ["layernorm"]}, "recompute_modules=layernorm with"),
    ],
)
def test_gpus_without_fp8(precision: PrecisionArguments, changes: dict[str, Any], words: str) -> None:
    (error,) = on_gpu(precision, **changes)
    assert words in error
    assert on_gpu(precision, **changes | {"on_gpu": False}) == []


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"rollout_dtype": "fp8"}, {("rollout",)}),
        ({"train_dtype": "fp8"}, {("train", "log_prob")}),
        ({"log_prob_dtype": "fp8", "rollout_dtype": "fp8"}, {("rollout",), ("train", "log_prob")}),
    ],
)
def test_nodes_without_fp8_have_the_other_phases(options: dict[str, Any], refused: set[tuple[str, ...]]) -> None:
    """As a reward model, which computes none of them."""
    precision = RLPrecisionArguments(**options)
    for phases in (("rollout",), ("train", "log_prob"), ()):
        check_node(precision, phases, on_gpu=True, capability=(9, 0))
        if phases in refused:
            with pytest.raises(RuntimeError, match="fp8 on GPUs of compute capability 8.0"):
                check_node(precision, phases, on_gpu=True, capability=(8, 0))
        else:
            check_node(precision, phases, on_gpu=True, capability=(8, 0))


def test_gpus_with_fp8() -> None:
    assert on_gpu(FP8) == on_gpu(PrecisionArguments(), capability=(8, 0)) == []
    assert on_gpu(replace(FP8, fp8_recipe="tensorwise"), capability=(8, 9)) == []
    assert on_gpu(FP8, capability=None) == [], "a node without GPUs does not know"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", False),
        ("--bf16", True),
        ("--train_dtype fp8", True),
        ("--log_prob_dtype fp8", True),
        ("--rollout_dtype fp8", True),
        ("--rollout_dtype bf16", True),
        ("--train_dtype fp8 --no-use_tis", False),
    ],
)
def test_importance_sampling_is_on_where_trainer_and_engines_differ(flags: str, expected: bool) -> None:
    assert parse(PPOConfig, [*PPO, *flags.split()], "ppo")[0].uses_tis is expected


def test_the_plan_says_which_phase_runs_where_in_what() -> None:
    flags = "--rollout_dtype fp8 --train_dtype fp8 --fp8-format e4m3 --fp8_fallback_steps 9 --bf16"
    config = parse(PPOConfig, [*PPO, *flags.split()], "ppo")[0]
    assert precision_lines(config.precision, bf16=True, roles=["actor", "critic"]) == [
        "rollout: fp8 in vLLM: weights of linear layers by block, made anew at each sync; past its guard bf16 for "
        "9 steps",
        "train: fp8 (blockwise, e4m3) in actor and critic; past its guard bf16 for 9 steps",
        "log_prob, and all else: bf16",
    ]
    assert precision_lines(PrecisionArguments(), bf16=False, roles=["actor"]) == []
