"""Ranks that cannot write a checkpoint: all of them hear of it, and can save again and go on."""

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.formats.run_checkpoints import SaveFailedError
from megarlhf.parallel.megatron_versions import NEWER, written_by_rank_0
from megarlhf.trainers.parity_cases import parity_case
from tests.distributed.cases import make_rows, parts
from tests.distributed.layouts import LAYOUTS, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model


@contextmanager
def small_files(most_bytes: int) -> Iterator[None]:
    """Files of this process and its children can have no more bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def refused(owner: Any, name: str) -> Iterator[None]:
    """What this call writes finds no room."""
    before = getattr(owner, name)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    setattr(owner, name, refuse)
    try:
        yield
    finally:
        setattr(owner, name, before)


def faulty_saves(rank: int, world_size: int, init_method: str, model_dir: Path, target: Path) -> list[str]:
    """Texts of the errors of saves that fail, each on one rank; the one after them is loaded, to the same weights."""
    said = []
    with world(LAYOUTS["TP2"], rank, init_method):
        engine = build(LAYOUTS["TP2"], model_dir)
        engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0)
        (target / "file").write_text("no directory")
        faults = [
            (1, "large", small_files(20_000)),
            (0, "all", small_files(100)),
            (0, "file/below", small_files(1 << 30)),
            *((0, name, refused(owner, name)) for owner, name in written_by_rank_0()),
        ]
        for faulty, name, fault in faults:
            try:
                if rank == faulty:
                    with fault:
                        save_engine(engine, target / name)
                else:
                    save_engine(engine, target / name)
            except SaveFailedError as error:
                said.append(str(error))
        save_engine(engine, target / "whole")
        expected = parts(engine, gradients=False)
        engine.train_step(make_rows(seed=6), parity_case("sft").objective, denominator=50.0)
        assert any(not torch.equal(a[2], b[2]) for a, b in zip(parts(engine, gradients=False), expected, strict=True))
        load_engine(engine, target / "whole")
        assert all(torch.equal(a[2], b[2]) for a, b in zip(parts(engine, gradients=False), expected, strict=True))
    return said


def test_all_ranks_hear_of_the_one_that_cannot_write(ranks: RankPool, tmp_path: Path) -> None:
    target = tmp_path / "checkpoints"
    target.mkdir()
    first, second = ranks.run(2, faulty_saves, make_model(tmp_path / "model", family="llama"), target)
    assert first == second
    # torch.save has words of its own where it cannot write.
    causes = ["rank 1: Worker failure: ", "rank 0: Worker failure: ", "rank 0: .*Not a directory"]
    refusals = [f"rank 0: .*No space left.*{name}" for _, name in written_by_rank_0()]
    assert len(refusals) == (2 if NEWER else 3)
    for text, cause in zip(first, [*causes, *refusals], strict=True):
        assert re.match(cause, text), text
