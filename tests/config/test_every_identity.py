"""Every key of a checkpoint's identity is there, and is refused when it differs."""

import json
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.config.in_process_programs import Programs

SHAPE = {"architecture", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"}
KEYS = {
    "ppo": SHAPE
    | {"lora", "optimizer_state", "advantage_estimator", "seed", "data", "reward_models"}
    | {"pretrain_data", "enable_ema"},
    "sft": SHAPE | {"lora", "optimizer_state", "seed", "data", "enable_ema"},
}
REFERENCE = "ref_pretrain or pretrain"
# What the other supervised programs have beside SFT's.
OWN = {
    "rm": {"margin_loss", "value_head_prefix"},
    "prm": {"reward_tokens"},
    "dpo": {"beta", "ipo", "label_smoothing", "nll_loss_coef", REFERENCE},
    "kto": {"beta", "desirable_loss_weight", "undesirable_loss_weight", REFERENCE},
    "kd": {"teacher_model", "kd_coef", "kd_loss", "teacher_top_k"},
}
KEYS |= {program: KEYS["sft"] | own for program, own in OWN.items()}
LAST = {program: 2 if program == "ppo" else 3 for program in KEYS}  # steps of the first run
CASES = [(program, key) for program, keys in (KEYS | OWN).items() for key in sorted(keys)]

# Options whose change makes another run of it.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "ppo": [
        {"pretrain": "{}/experts"},
        {"seed": 43},
        {"advantage_estimator": "rloo"},
        {"prompt_data": "{}/other_rows.jsonl"},
        {"max_samples": 7},
        {"input_template": "say {}"},
        {"input_key": "question"},
        {"pretrain_data": "{}/rows.jsonl"},
        {"enable_ema": True},
        {"use_distributed_optimizer": False},
        {"lora_rank": 2},
        {"reward_pretrain": "{}/rm", "critic_pretrain": "{}/model"},
    ],
    "sft": [
        {"pretrain": "{}/experts"},
        {"seed": 43},
        {"dataset": "{}/other_rows.jsonl"},
        {"max_samples": 7},
        {"output_key": "answer"},
        {"enable_ema": True},
        {"use_distributed_optimizer": False},
        {"lora_rank": 2},
    ],
    "rm": [{"margin_loss": True}, {"pretrain": "{}/experts"}, {"chosen_key": "better"}],
    "prm": [{"reward_tokens": ("n", "y")}, {"label_key": "answer"}],
    "dpo": [
        *({"beta": 0.2}, {"ipo": True}, {"label_smoothing": 0.1}, {"nll_loss_coef": 0.5}, {"rejected_key": "question"}),
        *({"ref_pretrain": "{}/other"}, {"pretrain": "{}/other"}),
    ],
    "kto": [
        *({"beta": 0.2}, {"desirable_loss_weight": 2.0}, {"undesirable_loss_weight": 2.0}, {"pretrain": "{}/other"}),
        {"label_key": "unwanted"},
    ],
    "kd": [
        *({"teacher_model": "{}/model"}, {"kd_coef": 0.5}, {"kd_loss": "reverse"}, {"teacher_top_k": 3}),
        {"output_key": "answer"},
    ],
}
# Options that may change: the same numbers, or those of steps to come as a learning rate has.
GO_ON: dict[str, list[dict[str, Any]]] = {
    "sft": [{"pretrain": "{}/other"}, {"learning_rate": 1e-3}, {"micro_batch_size": 2}],
    "dpo": [{"precompute_ref_log_probs": True}, {"ref_pretrain": "{}/other/../model"}],
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    yield Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return count()


def state_file(run: Path, program: str) -> Path:
    return run / "checkpoints" / f"iter_{LAST[program]:07d}" / "run_state.json"


def go_on(programs: Programs, program: str, load: Path, **options: Any) -> str:
    """Continue a run; what it stopped with."""
    changes = {"load": str(load), "train_iters": LAST[program] + 1} | options
    return str(getattr(programs, program)(tuple(changes.items())).error)


@pytest.mark.parametrize("program", KEYS)
def test_the_identity_has_these_keys_and_the_same_run_goes_on(programs: Programs, program: str) -> None:
    first = programs.directory / f"first_{program}"
    assert set(json.loads(state_file(first, program).read_text())["identity"]) == KEYS[program]
    assert go_on(programs, program, first) == ""


@pytest.mark.parametrize(("program", "key"), CASES)
def test_a_key_that_differs(programs: Programs, numbers: Iterator[int], program: str, key: str) -> None:
    other = shutil.copytree(programs.directory / f"first_{program}", programs.directory / f"changed{next(numbers)}")
    file = state_file(other, program)
    state = json.loads(file.read_text())
    state["identity"][key] = "something else"
    file.write_text(json.dumps(state))
    error = go_on(programs, program, other)
    assert error.startswith(("ConfigError", "ValueError")) and "something else" in error
    assert key in error or key == "optimizer_state"
    older = shutil.copytree(other, programs.directory / f"changed{next(numbers)}")
    del state["identity"][key]  # a checkpoint of a version that had no such key
    state_file(older, program).write_text(json.dumps(state))
    # None in this run, as they were before there were any.
    goes_on = key in ("lora", "teacher_top_k", "enable_ema", "reward_models", "pretrain_data")
    assert (go_on(programs, program, older) == "") == goes_on


@pytest.mark.parametrize(("program", "change"), [(p, c) for p, changes in OTHERS.items() for c in changes], ids=str)
def test_options_that_make_another_run(programs: Programs, program: str, change: dict[str, Any]) -> None:
    error = go_on(programs, program, programs.directory / f"first_{program}", **change)
    assert "load=" in error and ("saved" in error or "optimizers were kept" in error)
    option = next(iter(change))
    assert all(f"{key}: saved" in error for key in KEYS[program] if option in key.split(" or "))


@pytest.mark.parametrize(("program", "change"), [(p, c) for p, changes in GO_ON.items() for c in changes], ids=str)
def test_options_that_do_not(programs: Programs, program: str, change: dict[str, Any]) -> None:
    assert go_on(programs, program, programs.directory / f"first_{program}", **change) == ""
