"""What a run will write, in bytes, against what the disk has."""

import shutil
from pathlib import Path

import pytest

from megarlhf.cli import disk
from megarlhf.cli.disk import checkpoint_bytes, num_checkpoints, space_problems
from megarlhf.cli.run import Opened
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import parse
from megarlhf.formats.huggingface import read_checkpoint


@pytest.mark.parametrize(
    ("bf16", "distributed", "each"),
    [
        (True, True, 2 + 4 + 4 + 4),
        (True, False, 2 + 4 + 4 + 4),
        (False, True, 4 + 4 + 4 + 4),  # the distributed optimizer's main weights
        (False, False, 4 + 4 + 4),
    ],
)
def test_bytes_of_a_parameter(bf16: bool, distributed: bool, each: int) -> None:
    assert checkpoint_bytes(7_000_003, bf16=bf16, distributed=distributed) == 7_000_003 * each


def kept_at_most(*, first_step: int, last_step: int, intervals: list[int], keep: int, present: int) -> int:
    """The same by playing it through."""
    there = most = present
    for step in range(first_step + 1, last_step + 1):
        if step == last_step or any(step % interval == 0 for interval in intervals):
            there += 1
            most = max(most, there)
            there = min(there, keep)
    return most - present


@pytest.mark.parametrize("keep", [1, 3, 8])
@pytest.mark.parametrize("intervals", [[], [1], [4], [7], [50], [4, 10], [7, 3]])
def test_checkpoints_at_a_time(intervals: list[int], keep: int) -> None:
    for last_step in (1, 4, 30, 31):
        for first_step in (0, 1, 8, 29, 30, 31, 40):
            for present in (0, 1, keep):
                case = {"first_step": first_step, "last_step": last_step, "intervals": intervals, "keep": keep}
                assert num_checkpoints(**case, present=present) == kept_at_most(**case, present=present), case


def test_each_disk_is_asked_for_what_comes_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {
        tmp_path / "new" / "checkpoints": (3 * 2**30, "3 checkpoint(s)"),
        tmp_path / "new" / "hf": (2**29, "the exported model"),
        Path("/dev/shm/x/hf"): (2**31, "another model"),
    }
    total = shutil.disk_usage("/")

    def free(*, disk: float, memory: float) -> None:
        there = {True: total._replace(free=int(memory * 2**30)), False: total._replace(free=int(disk * 2**30))}
        monkeypatch.setattr(shutil, "disk_usage", lambda path: there[Path(path) == Path("/dev/shm")])

    free(disk=3.5, memory=2.0)
    assert space_problems(needs) == []
    free(disk=3.25, memory=2.0)
    (problem,) = space_problems(needs)
    assert f"the disk of {tmp_path} has 3.25 GiB free where the run needs 3.5 GiB" in problem
    assert "(3 GiB for 3 checkpoint(s) and 0.5 GiB for the exported model)" in problem
    free(disk=3.5, memory=1.5)
    (problem,) = space_problems(needs)
    assert "the disk of /dev/shm has 1.5 GiB free where the run needs 2 GiB (2 GiB for another model)" in problem


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--save_interval", "4"], {"checkpoints": "4 checkpoint(s)", "hf": "the exported model"}),
        (["--best_metric", "eval/accuracy", "--eval_interval", "10"], {"checkpoints": "4 checkpoint(s)"}),
        (  # after steps 10, 20 and 40 by the one reason, 16, 32 and 40 by the other, and 30
            ["--best_metric", "eval/accuracy", "--eval_interval", "10", "--save_interval", "16", "--max_ckpt_num", "9"],
            {"checkpoints": "6 checkpoint(s)"},
        ),
        (["--best_metric", "eval/accuracy", "--save_interval", "4"], {"checkpoints": "5 checkpoint(s)"}),
        (["--best_metric", "eval/accuracy"], {"checkpoints": "5 checkpoint(s)", "hf_best": "the best model"}),
    ],
)
def test_room_for_the_best_checkpoint_and_its_model(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: dict[str, str]
) -> None:
    """Three are kept, of at most 40 steps, and one more is there while the oldest of them goes."""
    found: dict[Path, tuple[int, str]] = {}
    monkeypatch.setattr(disk, "space_problems", lambda needs: found.update(needs))
    words = ["--pretrain", str(assets / "model"), "--prompt_data", "p", "--save", str(tmp_path), *flags]
    config, _ = parse(PPOConfig, words, "ppo")
    opened = Opened(*read_checkpoint(assets / "model", option="pretrain"), head="lm")
    disk.check_disk_space(config, [opened], first_step=0, last_step=40)
    assert expected.items() <= {place.name: what for place, (_, what) in found.items()}.items()
    assert (tmp_path / "hf_best" in found) == ("--best_metric" in flags)
