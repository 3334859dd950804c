"""Whether rewards read special tokens: as set, or where a label holds one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarlhf.cli.prompt_data import resolve_special_tokens
from megarlhf.cluster.workers import RolloutWorker
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.config.roles import ROLES
from megarlhf.rollout import engine


def config_of(assets: Path, setting: bool | None) -> PPOConfig:
    values = {"pretrain": str(assets / "model"), "prompt_data": "p.jsonl", "save": "run"}
    return from_dict(PPOConfig, values | {"reward_skip_special_tokens": setting})


@pytest.mark.parametrize(
    ("setting", "labels", "expected"),
    [
        (None, ["7", 7, None], True),
        (None, ["7", "7</s>"], False),
        (True, ["7</s>"], True),
        (False, ["7"], False),
    ],
)
def test_labels_decide_what_is_left_open(
    assets: Path, capsys: pytest.CaptureFixture[str], setting: bool | None, labels: list[Any], expected: bool
) -> None:
    config = resolve_special_tokens(config_of(assets, setting), labels)
    assert config.reward.reward_skip_special_tokens is expected
    said = capsys.readouterr().err
    assert ("labels hold special tokens, such as </s>" in said) == (setting is None and not expected)


@pytest.mark.parametrize(("setting", "expected"), [(None, True), (True, True), (False, False)])
def test_the_engine_is_told(
    assets: Path, monkeypatch: pytest.MonkeyPatch, setting: bool | None, expected: bool
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(engine, "RolloutEngine", lambda model, **options: given.update(options))
    worker = RolloutWorker.__new__(RolloutWorker)  # without taking over this process's output
    worker.spec = SimpleNamespace(  # type: ignore[assignment]
        config=config_of(assets, setting), role=ROLES["rollout"], threads=1, device_kind="cpu", devices=(0,)
    )
    worker.start()
    assert given["skip_special_tokens"] is expected
