"""The supervised loop in real ranks: a run that goes on is the run that never stopped; failures leave a checkpoint."""

import json
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megarlhf.config.arguments import LoggingArguments, ModelArguments
from megarlhf.config.supervised_arguments import SFTConfig, SFTDataArguments, SupervisedBatchArguments
from megarlhf.data.planning import PackingOptions
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import MicroBatch, TrainingRows, training_rows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import NonFiniteError, Objective
from megarlhf.engine.optimizer import OptimizerOptions
from megarlhf.metrics.sinks import Sinks
from megarlhf.models.build import ModelOptions
from megarlhf.trainers import supervised
from megarlhf.trainers.sft import sft_task
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, world
from tests.distributed.pool import RankPool
from tests.engine.test_full_disk import small_files
from tests.tiny_models import VOCAB_SIZE, make_model

TOTAL = 5


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run of TOTAL steps."""

    save: Path
    load: Path | None = None
    batch_size: int = 4
    stop_after: int = TOTAL  # a signal comes in this step
    fails: str | None = None  # "loss" or "log", in step 3
    save_interval: int | None = None
    full: tuple[int, ...] = ()  # rank 0 has no room for the checkpoints of these steps


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank has after it."""

    tensors: dict[str, torch.Tensor]  # weights, moments and step counts of the optimizer
    schedule: dict[str, Any]
    drawn: list[list[int]]  # rows of each step
    error: str
    said: list[str]  # warnings


def make_rows(count: int = 11) -> TrainingRows:
    """Ragged rows; 11 of them, so that epochs end inside a batch of 4."""
    generator = torch.Generator().manual_seed(8)
    ids = [torch.randint(3, VOCAB_SIZE, (4 + index % 5,), generator=generator).tolist() for index in range(count)]
    return training_rows(ids, [1 + index % 2 for index in range(count)])


def run(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, start: Start) -> Outcome:
    """The loop from the start to TOTAL steps or the failure."""
    config = SFTConfig(
        model=ModelArguments(pretrain=str(model_dir), seed=9),
        batch=SupervisedBatchArguments(global_batch_size=start.batch_size),
        data=SFTDataArguments(dataset="unused"),
        logging=LoggingArguments(
            save=str(start.save), load=start.load and str(start.load), save_interval=start.save_interval
        ),
    )
    identity = {"seed": 9}
    with world(layout, rank, init_method):
        options = OptimizerOptions(
            learning_rate=1e-2,
            total_steps=TOTAL,
            lr_warmup_ratio=0.4,
            weight_decay=0.1,
            use_distributed_optimizer=layout.distributed_optimizer,
        )
        packing = PackingOptions(max_tokens=32, share_prefix=False)
        engine = MegatronEngine(
            model_dir, head="lm", model=ModelOptions(), packing=packing, optimizer=options, logprob_chunk_tokens=64
        )
        progress = supervised.Progress()
        if start.load is not None:
            progress = supervised.load(engine, config.logging, identity=identity)
        drawn: list[list[int]] = []
        inner, pack = engine.step, engine.micro_batches

        def step_of() -> int:
            return progress.step + len(drawn)

        def micro_batches(rows: TrainingRows, indices: list[int]) -> list[MicroBatch]:
            drawn.append(np.asarray(indices).tolist())
            return pack(rows, indices)

        def step(batches: list[MicroBatch], objective: Objective, *, denominator: float) -> Any:
            if start.fails == "loss" and step_of() == 3:
                raise NonFiniteError("loss=nan")
            return inner(batches, objective, denominator=denominator)

        engine.step, engine.micro_batches = step, micro_batches  # type: ignore[method-assign]
        sinks = None
        if rank == 0:
            sinks = Sinks(start.save, total_steps=TOTAL, resumed_step=progress.step or None)
            if start.fails == "log":
                log = sinks.log
                sinks.log = lambda step, metrics: log(step, metrics) if step < 3 else 1 / 0  # type: ignore[assignment]
        error, warnings, write = "", ListHandler(), supervised.save_checkpoint

        def save_checkpoint(engine: MegatronEngine, options: Any, at: Any, *args: Any, **more: Any) -> None:
            with small_files(100) if rank == 0 and at.step in start.full else nullcontext():
                write(engine, options, at, *args, **more)

        supervised.save_checkpoint = save_checkpoint
        logging.getLogger("megarlhf").addHandler(warnings)
        try:
            supervised.train(
                config,
                engine,
                sft_task(),
                SupervisedData(rows=make_rows()),
                None,
                sinks,
                lambda: step_of() == start.stop_after,
                progress=progress,
                total_steps=TOTAL,
                identity=identity,
            )
        except (NonFiniteError, RuntimeError, ZeroDivisionError) as failure:
            error = type(failure).__name__
        finally:
            supervised.save_checkpoint = write
            logging.getLogger("megarlhf").removeHandler(warnings)
        if sinks is not None:
            sinks.close()
        dist.barrier()
        tensors = {name: p.detach().clone() for name, p in engine.named_parameters()}
        for number, state in enumerate(engine.optimizer.optimizer.state.values()):
            tensors |= {f"{number}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
        schedule = engine.scheduler.state_dict()
        return Outcome(tensors=tensors, schedule=schedule, drawn=drawn, error=error, said=warnings.said)


class ListHandler(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def rows_of(save: Path) -> list[dict[str, float]]:
    """Logged rows without what depends on the clock."""
    rows = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k.startswith(("sft/", "data/", "step"))} for row in rows]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", family="llama")


@pytest.mark.parametrize("name", ["one", "DP2-distopt"])
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_run_that_never_stopped(
    ranks: RankPool, model_dir: Path, tmp_path: Path, name: str
) -> None:
    layout = {"one": SINGLE, **LAYOUTS}[name]
    size = layout.world_size
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight = ranks.run(size, run, layout, model_dir, Start(save=whole))
    ranks.run(size, run, layout, model_dir, Start(save=broken, stop_after=3))
    resumed = ranks.run(size, run, layout, model_dir, Start(save=broken, load=broken))
    for expected, found in zip(straight, resumed, strict=True):
        assert found.drawn == expected.drawn[3:]
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in found.tensors)
        assert found.schedule == expected.schedule and found.schedule["num_steps"] == TOTAL
    assert rows_of(broken) == rows_of(whole)
    drawn = [row for batch in straight[0].drawn for row in batch]
    assert sorted(drawn[:11]) == list(range(11))  # an epoch, which ends inside step 3
    assert [row["data/epoch"] for row in rows_of(whole)] == pytest.approx([4 * n / 11 for n in range(1, 6)])
    # Oracle for the schedule: two steps of warm-up, then a cosine from 1e-2 to a tenth of it.
    cosine = [1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (n - 2) / 3)) for n in (3, 4, 5)]
    assert [row["sft/learning_rate"] for row in rows_of(broken)] == pytest.approx([5e-3, 1e-2, *cosine])
    moved = [rows_of(whole)[n]["sft/loss"] for n in range(TOTAL)]
    assert len(set(moved)) == TOTAL  # each step changes the model


def test_another_batch_size_goes_on_with_the_next_row(ranks: RankPool, model_dir: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    (first,) = ranks.run(1, run, SINGLE, model_dir, Start(save=save, stop_after=2))
    (rest,) = ranks.run(1, run, SINGLE, model_dir, Start(save=save, load=save, batch_size=3))
    assert sorted(row for batch in [*first.drawn, rest.drawn[0]] for row in batch) == list(range(11))
    assert [row["data/epoch"] for row in rows_of(save)] == pytest.approx([n / 11 for n in (4, 8, 11, 14, 17)])


def test_the_first_step_of_a_start_says_what_lies_on_the_device(
    ranks: RankPool, model_dir: Path, tmp_path: Path
) -> None:
    """Float32 weights, gradients and two running means, with torch's step count of each; no reference."""
    save = tmp_path / "run"
    (found,) = ranks.run(1, run, SINGLE, model_dir, Start(save=save, stop_after=2))
    rows = list(map(json.loads, (save / "metrics.jsonl").read_text().splitlines()))
    sizes = [{key: value * 2**30 for key, value in row.items() if key.startswith("memory/")} for row in rows]
    count = sum(t.numel() for name, t in found.tensors.items() if name.endswith((".weight", ".bias")))
    steps = sum(t.nbytes for name, t in found.tensors.items() if name.endswith(".step"))
    assert sizes == [
        {
            "memory/sft/parameters_gib": 4 * count,
            "memory/sft/gradients_gib": 4 * count,
            "memory/sft/optimizer_gib": 8 * count + steps,
            "memory/sft/reference_gib": 0,
        },
        {},
    ]


@pytest.mark.parametrize(("fails", "saved", "errors"), [("loss", 2, "NonFiniteError"), ("log", 3, "ZeroDivisionError")])
def test_a_failure_saves_the_last_good_state_first(
    ranks: RankPool, model_dir: Path, tmp_path: Path, fails: str, saved: int, errors: str
) -> None:
    save = tmp_path / "run"
    first, second = ranks.run(2, run, LAYOUTS["DP2-distopt"], model_dir, Start(save=save, fails=fails))
    assert first.error == errors
    assert second.error == ("RuntimeError" if fails == "log" else errors)  # every rank leaves the loop
    pointer = save / "checkpoints" / "latest_checkpointed_iteration.txt"
    state = json.loads((save / "checkpoints" / f"iter_{saved:07d}" / "run_state.json").read_text())
    assert int(pointer.read_text()) == saved == state["step"] and state["consumed"] == 4 * saved


def test_a_full_disk_ends_no_run_that_has_other_checkpoints_to_come(
    ranks: RankPool, model_dir: Path, tmp_path: Path
) -> None:
    """Where the last one cannot be written either it is an error of every rank, and the one before stays."""
    whole, save, layout = tmp_path / "whole", tmp_path / "run", LAYOUTS["DP2-distopt"]
    straight = ranks.run(2, run, layout, model_dir, Start(save=whole))
    found = ranks.run(2, run, layout, model_dir, Start(save=save, save_interval=2, full=(2, 5)))
    for rank, (expected, own) in enumerate(zip(straight, found, strict=True)):
        assert own.drawn == expected.drawn and own.error == "SaveFailedError"
        assert all(torch.equal(own.tensors[name], expected.tensors[name]) for name in expected.tensors)
        said = [text for text in own.said if "checkpoint" in text]
        assert len(said) == (rank == 0), "once"
    assert said == [] and found[0].said[0].startswith(f"the checkpoint of step 2 could not be written to {save}")
    assert found[0].said[0].endswith(
        "there is no complete one yet; the run goes on, and saves again after step 4: free space"
    )
    assert sorted(path.name for path in (save / "checkpoints").iterdir()) == [
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
    ]
    resumed = ranks.run(2, run, layout, model_dir, Start(save=save, load=save))
    for expected, own in zip(straight, resumed, strict=True):
        assert own.error == "" and own.drawn == expected.drawn[4:]
        assert all(torch.equal(own.tensors[name], expected.tensors[name]) for name in expected.tensors)
