"""Which checkpoints stay when a new one is complete."""

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
