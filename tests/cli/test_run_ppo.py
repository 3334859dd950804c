"""What a run decides where its configuration leaves it open."""

import pytest

from megarlhf.cli import run_ppo
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
    monkeypatch.setattr(run_ppo, "num_cores", lambda: cores)
    config, _ = parse(PPOConfig, ["--pretrain", "m", "--prompt_data", "p", "--save", "s", *flags], "ppo")
    assert run_ppo.resolve(config, "local").reward.reward_num_workers == expected
