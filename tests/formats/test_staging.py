"""A directory appears whole or not at all, and what was done is not done again."""

import json
from pathlib import Path

import pytest

from megarlhf.formats.staging import StagingDirectory, check_staging, replace_directory


def interrupted(target: Path, steps: list[str], identity: dict[str, int]) -> None:
    """Begin and be interrupted after these steps."""
    with pytest.raises(KeyboardInterrupt), StagingDirectory(target, identity) as staging:
        for step in steps:
            (staging.path / step).write_text(step)
            staging.note(step, {"bytes": len(step)})
        raise KeyboardInterrupt


def test_it_goes_on_after_the_steps_noted(tmp_path: Path) -> None:
    target = tmp_path / "target"
    interrupted(target, ["a", "b"], {"of": 1})
    assert not target.exists()
    with StagingDirectory(target, {"of": 1}) as staging:
        assert staging.done == {"a": {"bytes": 1}, "b": {"bytes": 1}}
        assert (staging.path / "a").read_text() == "a"
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_another_identity_begins_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "target", ["a"], {"of": 1})
    with StagingDirectory(tmp_path / "target", {"of": 2}) as staging:
        assert staging.done == {}
    assert list((tmp_path / "target").iterdir()) == []


def test_a_note_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    interrupted(tmp_path / "target", ["a", "b"], {"of": 1})
    journal = tmp_path / "target.partial" / "progress.jsonl"
    journal.write_text(journal.read_text()[:-4])
    with StagingDirectory(tmp_path / "target", {"of": 1}) as staging:
        assert list(staging.done) == ["a"]
        staging.note("c", 3)
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert lines == [{"of": 1}, ["a", {"bytes": 1}], ["c", 3]]


def test_a_value_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), StagingDirectory(tmp_path / "target", {}):
        raise ValueError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with StagingDirectory(tmp_path / "target", {}), pytest.raises(ValueError, match="another process is writing"):
        StagingDirectory(tmp_path / "target", {})


def test_an_older_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_text("")
    with StagingDirectory(tmp_path / "target", {}) as staging:
        (staging.path / "new").write_text("")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]


@pytest.mark.parametrize("older", [False, True])
def test_what_the_user_called_old_stays(tmp_path: Path, older: bool) -> None:
    (tmp_path / "target.old").mkdir()
    (tmp_path / "target.old" / "thesis").write_text("words")
    if older:
        (tmp_path / "target").mkdir()
    (tmp_path / "made").mkdir()
    replace_directory(tmp_path / "made", tmp_path / "target")
    assert (tmp_path / "target.old" / "thesis").read_text() == "words"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "target.old"]


def test_a_replacement_that_was_interrupted_is_cleaned_up(tmp_path: Path) -> None:
    for name in (".target.megarlhf-old", "target", "made"):
        (tmp_path / name).mkdir()
    replace_directory(tmp_path / "made", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_partial_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "target.partial"
    theirs.mkdir()
    check_staging(tmp_path / "target")
    (theirs / "thesis").write_text("words")
    for attempt in (lambda: check_staging(tmp_path / "target"), lambda: StagingDirectory(tmp_path / "target", {})):
        with pytest.raises(ValueError, match=r"target\.partial, where it would be made, holds something else"):
            attempt()
    assert [path.name for path in theirs.iterdir()] == ["thesis"]
