"""The run directory is tried out, whatever the system says to it, and nothing of the trial stays."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megarlhf.config import check_save
from megarlhf.config.arguments import LoggingArguments
from megarlhf.config.check_save import ckpt_errors, save_errors
from megarlhf.config.checks import _logging_errors


def contents(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with things that are no run directories."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(
    ("save", "said"),
    [
        ("", "is empty"),
        ("/dev/null/run", "/dev/null"),
        ("/dev/full", "/dev/full"),
        ("/proc/run", "/proc/run: No such file"),
        ("/sys/run", "/sys/run"),
        ("{}/file", "{}/file"),
        ("{}/file/a/run", "file"),
        ("{}/dangling", "dangling is a link to nowhere, which is not there"),
        ("{}/dangling/run", "dangling is a link to nowhere, which is not there"),
        ("{}/loop/run", "loop"),
        ("{}/made/" + "n" * 300, "File name too long"),
        ("{}/" + "/".join(["d" * 200] * 30), "File name too long"),
        ("{}/nul\0byte", "null byte"),
        ("{}/\udcff\ud800", "surrogates"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_place_where_nothing_can_be_made(place: Path, save: str, said: str) -> None:
    before = contents(place)
    (error,) = save_errors(save.replace("{}", str(place)), None)
    assert error.startswith("save=") and said.replace("{}", str(place)) in error
    assert contents(place) == before, "nothing stays"


def test_room_for_the_files_in_it(place: Path) -> None:
    """The directory itself could be made; the paths of what goes into it would be too long."""
    name_length = os.pathconf(place, "PC_NAME_MAX") - 55
    depth = (os.pathconf(place, "PC_PATH_MAX") - 60 - len(str(place))) // (name_length + 1)
    save = place.joinpath(*["d" * name_length] * depth)
    save = save / ("e" * (os.pathconf(place, "PC_PATH_MAX") - 60 - len(str(save))))
    assert "File name too long" in save_errors(str(save), None)[0]
    assert contents(place) == {"file", "dangling", "loop"}


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_whatever_the_system_answers(place: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), "here")

    monkeypatch.setattr(os, call, refuse)
    (error,) = save_errors(str(place / "new" / "run"), None)
    assert os.strerror(number) in error
    monkeypatch.undo()
    assert contents(place) == {"file", "dangling", "loop"}


@pytest.mark.parametrize("name", ["checkpoints", "hf", "hf_ema", "logs", "tensorboard", "config.yaml", "report.html"])
def test_what_is_in_the_directory_already_is_tried_too(place: Path, name: str) -> None:
    (place / "run").mkdir()
    (place / "run" / name).symlink_to(place / "nowhere" / "else")
    assert name in save_errors(str(place / "run"), None)[0]
    (place / "run" / name).unlink()
    wrong = place / "run" / name
    wrong.mkdir() if "." in name else wrong.write_text("")
    assert name in save_errors(str(place / "run"), None)[0]


def test_a_sound_directory_is_left_as_it_was(place: Path) -> None:
    before = contents(place)
    assert save_errors(str(place / "new" / "run"), None) == []
    assert contents(place) == before
    (place / "run" / "logs").mkdir(parents=True)
    (place / "run" / "config.yaml").write_text("model:\n")
    (place / "link").symlink_to("run")
    before = contents(place)
    assert save_errors(str(place / "link"), None) == []
    assert contents(place) == before and (place / "run" / "config.yaml").read_text() == "model:\n"


def test_what_another_process_puts_there_meanwhile_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = check_save._probe
    monkeypatch.setattr(check_save, "_probe", lambda directory: (probe(directory), (directory / "theirs").mkdir()))
    assert save_errors(str(place / "new"), None) == []
    assert "new/theirs" in contents(place)


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints"])
def test_a_used_run_directory_is_only_continued(tmp_path: Path, trace: str) -> None:
    used, link = tmp_path / "used", tmp_path / "link"
    used.mkdir()
    (used / trace).mkdir() if trace == "checkpoints" else (used / trace).write_text("")
    link.symlink_to("used")
    assert "holds a run already" in save_errors(str(used), None)[0]
    for other in (str(tmp_path / "other"), "nul\0byte", "n" * 300):
        assert "holds another run" in save_errors(str(used), other)[0]
    assert save_errors(str(used), str(link)) == []
    assert save_errors(str(tmp_path / "new"), str(used)) == []


def test_checkpoints_in_another_directory(place: Path) -> None:
    save, other, used = place / "run", place / "large" / "disk", place / "used"
    before = contents(place)
    assert ckpt_errors(str(save), None) == ckpt_errors(str(save), str(other)) == []
    assert ckpt_errors(str(save), "/dev/null/c")[0].startswith("ckpt_path=/dev/null/c cannot be made")
    assert contents(place) == before
    used.mkdir()
    (used / "latest_checkpointed_iteration.txt").write_text("3")
    assert "holds another run's checkpoints" in ckpt_errors(str(save), str(used))[0]
    save.mkdir()
    (save / "checkpoints").symlink_to(used)
    assert ckpt_errors(str(save), str(used)) == [], "its own"
    assert "has the run's checkpoints already" in ckpt_errors(str(save), str(other))[0]
    (save / "checkpoints").unlink()
    (save / "checkpoints").mkdir()
    assert ckpt_errors(str(save), str(save / "checkpoints")) == []


def test_load_checkpoint_loads_what_is_there(place: Path) -> None:
    save = place / "run"
    logging = LoggingArguments(save=str(save), load=str(place / "earlier"), load_checkpoint=True)
    assert logging.continued() == logging, "nothing is there yet"
    (save / "checkpoints").mkdir(parents=True)
    assert logging.continued() == logging, "nor is a complete one"
    (save / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    assert logging.continued() == replace(logging, load=str(save))
    assert replace(logging, load_checkpoint=False).continued().load == str(place / "earlier")


@pytest.mark.parametrize("load", [None, "earlier"])
def test_load_checkpoint_starts_again_where_there_is_none(place: Path, load: str | None) -> None:
    save = place / "run"
    save.mkdir()
    (save / "metrics.jsonl").write_text('{"step": 1}\n')
    logging = LoggingArguments(save=str(save), load=load, load_checkpoint=True)
    said = [
        _logging_errors(each, evaluation="", evaluates=False)
        for each in (logging, replace(logging, load_checkpoint=False))
    ]
    assert said[0] == [] and len(said[1]) == 1 and "holds" in said[1][0]


def test_one_rank_tries(place: Path) -> None:
    logging = LoggingArguments(save="/dev/null/run")
    assert len(_logging_errors(logging, evaluation="eval_data", evaluates=False)) == 1
    assert _logging_errors(logging, evaluation="eval_data", evaluates=False, tries_save=False) == []
