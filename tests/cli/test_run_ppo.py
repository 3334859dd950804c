"""What a run decides where its configuration leaves it open."""

from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli import rewards
from megarlhf.cli.prompt_data import load_data
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import parse


@pytest.mark.parametrize(
    ("flags", "cores", "expected"),
    [
        (["--reward_function", "r.py"], 64, 1),
        (["--reward_rule", "math"], 4, 4),
        (["--reward_rule", "math"], 64, 8),
        (["--reward_rule", "math", "--reward_num_workers", "3"], 64, 3),
        (["--reward_function", "r.py", "--reward_num_workers", "3"], 1, 3),
    ],
)
def test_rules_run_on_all_cores_and_functions_that_may_keep_state_in_one_process(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], cores: int, expected: int
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(rewards, "num_cores", lambda: cores)
    monkeypatch.setattr(rewards, "RewardScorer", lambda **options: given.append(options["num_workers"]))
    config, _ = parse(PPOConfig, ["--pretrain", "m", "--prompt_data", "p", "--save", "s", *flags], "ppo")
    rewards.reward_sources(config.reward)
    assert given == [expected]


def test_prompts_of_both_data_sets_are_counted(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, values in (("train", "123"), ("eval", "34")):
        lines = [f'{{"input": "{value}", "label": "1"}}\n' for value in values]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    flags = {"pretrain": assets / "model", "prompt_data": tmp_path / "train.jsonl", "save": "s", "reward_function": "r"}
    for evaluation, said in (("eval", "warning: 1 of 2 prompts of"), (None, "")):
        given = flags | ({} if evaluation is None else {"eval_data": tmp_path / f"{evaluation}.jsonl"})
        config, _ = parse(PPOConfig, [f"--{key}={value}" for key, value in given.items()], "ppo")
        load_data(config)
        printed = capsys.readouterr().err
        assert printed.startswith(said) if said else printed == ""
