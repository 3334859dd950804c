"""Groups end with their world: their threads and sockets go with the engine that was built in it, without a search."""

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.sharing import SharedWeights
from megarlhf.parallel import groups
from megarlhf.parallel.device import freeze_garbage_collector
from megarlhf.trainers.parity_cases import (
    parity_case,
)
from tests.distributed.cases import make_rows
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

Held = tuple[int, int]  # this process's threads and open files
WORLDS: dict[str, tuple[str, Layout]] = {
    "TP2-SP": ("qwen3", LAYOUTS["TP2-SP"]),
    "CP2": ("qwen3", LAYOUTS["CP2-p2p"]),
    "PP2-VPP2, bf16": ("qwen3", replace(LAYOUTS["PP2-VPP2"], bf16=True)),
    "DP2, all options": ("qwen3", replace(LAYOUTS["DP2-distopt-overlap"], recompute="full", share_prefix=True)),
    "EP2, balance loss": ("mixtral", replace(MOE_LAYOUTS["EP2-distopt"], moe_aux_loss_coeff=0.5)),
}


def held() -> Held:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def live(layout: Layout, rank: int, root: Path, model_dir: Path, *, frozen: bool, whole: bool) -> Held:
    """What is held inside a world whose engine trains; `whole`: and does the rest of what a worker's does."""
    with world(layout, rank, f"file://{root}/rendezvous"):
        engine = build(layout, model_dir)
        if frozen:
            freeze_garbage_collector()
        if whole:
            engine.keep_reference()
            shared = SharedWeights(engine)
        engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0)
        if whole:
            save_engine(engine, root / "checkpoint")
            load_engine(engine, root / "checkpoint")
            shared.refresh()
        return held()


def live_and_count(
    rank: int,
    world_size: int,
    init_method: str,
    root: Path,
    worlds: list[tuple[Path, Layout]],
    frozen: bool,
    whole: bool,
) -> list[tuple[Held, Held]]:
    """What is held inside and after each world, while the garbage collector does not run; first, before any."""
    gc.collect()
    gc.disable()
    counts = [(held(), held())]
    try:
        for number, (model_dir, layout) in enumerate(worlds):
            inside = live(layout, rank, root / str(number), model_dir, frozen=frozen, whole=whole)
            counts.append((inside, held()))
    finally:
        gc.enable()
        gc.unfreeze()
    return counts


def check(ranks: RankPool, root: Path, worlds: list[tuple[Path, Layout]], *, frozen: bool, whole: bool) -> None:
    for number in range(len(worlds)):
        (root / str(number)).mkdir()
    for counts in ranks.run(2, live_and_count, root, worlds, frozen, whole):
        (_, before), *lives = counts
        assert min(inside[0] for inside, _ in lives) > 40, "a world has threads that can be left behind"
        assert [threads for _, (threads, _) in lives] == [before[0]] * len(worlds)
        assert [files for _, (_, files) in lives] == [lives[0][1][1]] * len(worlds)  # torch keeps two, once


def test_twenty_worlds_leave_no_threads(ranks: RankPool, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", family="qwen3")
    check(ranks, tmp_path, [(model_dir, LAYOUTS["TP2"])] * 20, frozen=False, whole=False)


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_of_every_kind_leave_no_threads_though_the_collector_was_frozen(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    family, layout = WORLDS[name]
    model_dir = make_model(tmp_path / "model", family=family)
    check(ranks, tmp_path, [(model_dir, layout)] * 3, frozen=True, whole=True)


def live_on(
    rank: int, world_size: int, init_method: str, root: Path, model_dir: Path, cycle: bool
) -> tuple[Held, Held, list[str]]:
    """What is held before and inside a world that follows on one whose engine is in use or in a frozen cycle."""
    layout, before, kept = LAYOUTS["TP2"], held(), []

    def leave_something() -> None:
        with world(layout, rank, f"file://{root}/first-{cycle}"):
            things: list[object] = [build(layout, model_dir)]
            things.append(things if cycle else None)
            kept.extend([] if cycle else things)
        freeze_garbage_collector()

    leave_something()
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups._logger, "warning", lambda text, *values: warnings.append(text % values))
        with world(layout, rank, f"file://{root}/second-{cycle}"):
            return before, held(), warnings


def test_what_cycles_or_callers_still_hold_is_collected_or_said_at_the_next_world(
    ranks: RankPool, tmp_path: Path
) -> None:
    model_dir = make_model(tmp_path / "model", family="qwen3")
    in_use, in_cycles = (ranks.run(2, live_on, tmp_path, model_dir, cycle) for cycle in (False, True))
    for (before, threads, warnings), (_, collected, none) in zip(in_use, in_cycles, strict=True):
        assert len(warnings) == 1 and "are still in use by their engines" in warnings[0]
        assert not none
        assert threads[0] - collected[0] > 40 and collected[0] - before[0] > 40
