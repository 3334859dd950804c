"""Which checkpoints stay when a new one is complete."""

import json
from pathlib import Path

import pytest

from megarlhf.formats import run_checkpoints


@pytest.mark.parametrize(
    ("keep", "most_gib", "left"),
    [
        (2, None, [4, 5]),
        (9, None, [1, 2, 3, 4, 5]),
        (0, None, [1, 2, 3, 4, 5]),
        (9, 0.0035, [3, 4, 5]),
        (2, 0.0035, [4, 5]),
        (9, 0.0001, [5]),
        (0, 0.0001, [5]),
    ],
)
def test_the_oldest_go_by_number_and_by_size(
    tmp_path: Path, keep: int, most_gib: float | None, left: list[int]
) -> None:
    """Each takes 1/1024 GiB and a few bytes."""
    for step in range(1, 6):
        (run_checkpoints.begin(tmp_path, step) / "actor").mkdir()
        (run_checkpoints.staging_directory(tmp_path, step) / "actor" / "weights").write_bytes(bytes(2**20))
        run_checkpoints.commit(tmp_path, step, {"step": step}, keep=keep, most_gib=most_gib)
        assert run_checkpoints.latest(tmp_path)[0] == step
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_000000{step}" for step in left]


@pytest.mark.parametrize(
    ("keep", "most_gib", "best", "left"),
    [
        (2, None, [1, 1, 1, 1, 1], [1, 4, 5]),
        (2, None, [1, 2, 2, 2, 5], [4, 5]),
        (2, None, [1, 1, 3, 3, 3], [3, 4, 5]),
        (2, None, [1, 1, 1, 4, 4], [3, 4, 5]),
        (1, None, [None, 2, 2, 2, 2], [2, 5]),
        (9, 0.0035, [1, 1, 1, 1, 1], [1, 4, 5]),
        (9, 0.0001, [1, 2, 2, 2, 2], [2, 5]),
        (0, None, [1, 1, 3, 3, 3], [1, 2, 3, 4, 5]),
    ],
)
def test_the_best_stays_besides_those_that_are_kept(
    tmp_path: Path, keep: int, most_gib: float | None, best: list[int | None], left: list[int]
) -> None:
    for step in range(1, 6):
        (run_checkpoints.begin(tmp_path, step) / "actor").mkdir()
        (run_checkpoints.staging_directory(tmp_path, step) / "actor" / "weights").write_bytes(bytes(2**20))
        state = {"step": step, "best": {"step": best[step - 1], "value": 0.5}}
        run_checkpoints.commit(tmp_path, step, state, keep=keep, most_gib=most_gib)
        if best[step - 1] is not None:
            assert (tmp_path / "best").resolve().name == f"iter_000000{best[step - 1]}"
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_000000{step}" for step in left]
    assert json.loads((tmp_path / "best" / "run_state.json").read_text())["step"] == best[-1]


def test_a_best_step_of_another_directory_is_not_linked(tmp_path: Path) -> None:
    run_checkpoints.begin(tmp_path, 7)
    run_checkpoints.commit(tmp_path, 7, {"step": 7, "best": {"step": 5}}, keep=2)
    assert not (tmp_path / "best").is_symlink() and run_checkpoints.latest(tmp_path)[0] == 7


def test_what_a_failed_save_has_written_is_gone_and_the_sentence_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        path.with_name(path.name + ".partial").write_text(text[:1])
        raise OSError("no room for the pointer")

    run_checkpoints.begin(tmp_path, 1)
    run_checkpoints.abandon(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    said = str(run_checkpoints.save_failed(tmp_path, 1, OSError("no room")))
    assert said.startswith(f"the checkpoint of step 1 could not be written to {tmp_path} (no room, ")
    assert said.endswith(" MiB free): there is no complete one yet")
    run_checkpoints.begin(tmp_path, 2)
    run_checkpoints.commit(tmp_path, 2, {"step": 2}, keep=2)
    before = sorted(tmp_path.rglob("*"))
    (run_checkpoints.begin(tmp_path, 4) / "actor").mkdir()
    monkeypatch.setattr(run_checkpoints, "write_whole", refuse)
    with pytest.raises(OSError, match="pointer"):  # of a checkpoint that has its own name by then
        run_checkpoints.commit(tmp_path, 4, {"step": 4}, keep=2)
    run_checkpoints.abandon(tmp_path, 4)
    assert sorted(tmp_path.rglob("*")) == before and run_checkpoints.latest(tmp_path)[0] == 2
    said = str(run_checkpoints.save_failed(tmp_path, 4, OSError("x")))
    assert said.endswith("the last complete one is that of step 2")
