"""Checks of the options of indexed data."""

from pathlib import Path
from typing import Any

import pytest

from megarlhf.config.checks import check_supervised
from megarlhf.config.command_line import from_dict, parse
from megarlhf.config.supervised_arguments import SFTConfig
from tests.config.test_checks import write_model


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes(b"")
    prefix = str(tmp_path / "a")
    shared = {"pretrain": write_model(tmp_path / "model"), "save": str(tmp_path / "run"), "max_len": 64}
    return shared | {"data_path": ["3", prefix, "1", prefix], "pretrain_mode": True}


def test_a_sound_one(base: dict[str, Any]) -> None:
    config = from_dict(SFTConfig, base | {"eval_interval": 2})
    assert check_supervised(config) == [] and config.data.evaluates and not config.data.appends_eos


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretrain_mode": False, "output_key": "x"}, "data_path without pretrain_mode=True"),
        ({"split": "1;2"}, "split=1;2 must be"),
        ({"split": "0,1,0"}, "split=0,1,0 must be"),
        ({"eval_iters": 0}, "eval_iters=0 must be at least 1"),
        ({"data_path": ["nowhere"]}, "data_path=nowhere has no file nowhere.idx"),
        ({"dataset": "{}/a.bin"}, "dataset=.*a.bin is ignored with data_path"),
        ({"max_samples": 3}, "max_samples=3 is ignored with data_path"),
        ({"split": "1,0,0", "eval_interval": 3}, "eval_interval=3 has nothing to evaluate on: set split"),
        ({"data_path": [], "dataset": "{}/a.bin", "split": "1,0,0"}, "split=1,0,0 is ignored without data_path"),
        ({"data_path": []}, r"dataset is missing \(or data_path"),
    ],
)
def test_one_mistake(base: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    given = {k: v.replace("{}", str(tmp_path)) if isinstance(v, str) else v for k, v in (base | changes).items()}
    errors = check_supervised(from_dict(SFTConfig, given))
    with pytest.raises(ValueError, match=said):
        raise ValueError("\n".join(errors))


def test_megatrons_spellings() -> None:
    flags = ["--data-path", "0.5", "a", "0.5", "b", "--split", "949,50,1", "--seq-length", "33", "--eval-iters", "7"]
    config, _ = parse(SFTConfig, [*flags, "--pretrain", "x", "--save", "y"], prog="sft")
    assert config.data.data_path == ("0.5", "a", "0.5", "b") and config.data.split == "949,50,1"
    assert config.batch.max_len == 33 and config.data.eval_iters == 7
