"""The supervised loop: one process per rank, every rank runs it; what is trained on which rows is a parameter."""

import logging as logs
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megarlhf.config.arguments import LoggingArguments
from megarlhf.config.supervised_arguments import SupervisedConfig
from megarlhf.data.sampling import PromptSampler
from megarlhf.data.supervised import SupervisedData, Units
from megarlhf.data.types import Ints, MicroBatch
from megarlhf.engine import checkpoint
from megarlhf.engine.average import WeightAverage
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import NonFiniteError, Objective
from megarlhf.formats import run_checkpoints
from megarlhf.metrics.sinks import Sinks
from megarlhf.metrics.timers import Timers
from megarlhf.parallel.device import current_device
from megarlhf.trainers.best import Best
from megarlhf.trainers.evaluation import evaluation_is_due
from megarlhf.trainers.saving import saved

logger = logs.getLogger(__name__)
Prepare = Callable[[SupervisedData, Ints, list[MicroBatch]], list[MicroBatch]]
MEASURED_UNITS = 1024  # of the training data, for entries of config.json where there is no evaluation data


@dataclass(frozen=True, kw_only=True)
class SupervisedTask:
    """What a supervised run trains; one a trainer.

    Attributes:
        name: of its metrics, before the slash.
        mean_over: what the loss is a mean of: the targets that it looks at, or units of rows, such as pairs.
        prepare: gives this rank's packed sequences of these rows back with what the loss asks for beside them, such as
            log-probs of a reference; every rank calls it.
        metrics: of the means that an objective reports, what is logged in their place.
        complete: gives the data sets of a run back with what is computed of them once, before training and before a
            checkpoint is loaded; every rank calls it.
        config_entries: of the last evaluation's numbers, what the exported config.json has besides; where there is no
            evaluation data they are those of the first MEASURED_UNITS units of the training data.
    """

    name: str
    objective: Objective
    mean_over: Literal["targets", "units"] = "targets"
    prepare: Prepare = lambda data, rows, batches: batches
    metrics: Callable[[dict[str, float]], dict[str, float]] = lambda means: means
    complete: Callable[[list[SupervisedData]], list[SupervisedData]] | None = None
    config_entries: Callable[[dict[str, float]], dict[str, float]] | None = None

    def denominator(self, data: SupervisedData, rows: Ints) -> float:
        """What the loss of these rows is divided by."""
        if self.mean_over == "targets":
            return float(data.rows.count_loss_targets(rows))
        units = data.rows.unit_ids
        first = (rows == 0) | (units[rows] != units[rows - 1])  # of a unit that is drawn twice each time
        return float(first.sum())


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run continues."""

    step: int = 0  # last finished step
    consumed: int = 0  # units of rows drawn so far
    config_entries: Mapping[str, float] = field(default_factory=dict)  # of the exported config.json, where it ended
    best: Best = Best()  # evaluation so far


def train(
    config: SupervisedConfig,
    engine: MegatronEngine,
    task: SupervisedTask,
    data: Units,
    evaluation: Units | None,
    sinks: Sinks | None,
    should_stop: Callable[[], bool],
    *,
    progress: Progress,
    total_steps: int,
    identity: dict[str, Any],
    average: WeightAverage | None = None,
) -> Progress:
    """Optimizer steps progress.step + 1 .. total_steps over shuffled epochs of the data's units.

    Args:
        sinks: on rank 0; None elsewhere.
        should_stop: looked at on rank 0 after each step; a true answer saves and ends the run on every rank.
        identity: what a checkpoint must agree with to be loaded.
        average: of the weights over the steps, saved with them.
    Returns:
        Where it ended, the same on every rank.
    Raises:
        NonFiniteError: a loss or gradient that is not finite; the step before it is saved.
        SaveFailedError: the last step cannot be saved.
        RuntimeError: rank 0 could not log a step (there it is the cause that is raised); the step is saved.
    """
    timers, logging = Timers(), config.logging
    sampler = _sampler(config, data, progress)
    on_disk, entries, best = progress.step, progress.config_entries, progress.best

    def reached(step: int) -> Progress:
        return Progress(step=step, consumed=sampler.consumed(step), config_entries=entries, best=best)

    def save(step: int, *, is_last: bool = True) -> bool:
        nonlocal on_disk
        write = partial(save_checkpoint, engine, logging, reached(step), identity, average=average)
        with timers("save"):
            done = step == on_disk or saved(
                write, step, logging, total_steps=total_steps, is_last=is_last, says=sinks is not None
            )
        on_disk = step if done else on_disk
        return done

    for step in range(progress.step + 1, total_steps + 1):
        if sinks is not None:
            sinks.phase("train")
        try:
            with timers("train"):
                metrics = _step(engine, task, data, sampler.batch(step - 1), average)
        except NonFiniteError:  # on every rank, and the weights are still those of the step before
            save(step - 1)
            raise
        metrics |= {"data/epoch": sampler.epoch(step)} | _precision(engine, says=sinks is not None)
        if step == progress.step + 1:
            metrics |= memory(engine, task.name)
        before = best
        stopping, epochs = agree(should_stop()), (sampler.epoch(step - 1), sampler.epoch(step))
        last = step == total_steps or stopping
        found: dict[str, float] = {}
        if evaluation is not None and (last or evaluation_is_due(step, logging.eval_interval, epochs=epochs)):
            with timers("eval"):
                found = evaluate(engine, task, evaluation, config.batch.global_batch_size)
                metrics |= {f"{task.name}/eval_{name}": value for name, value in found.items()}
                best = best.after(step, metrics, logging)
        if last and task.config_entries is not None:
            with timers("eval"):
                measured = found or evaluate(engine, task, data, config.batch.global_batch_size, most=MEASURED_UNITS)
                entries = task.config_entries(measured)
        problem = _log(sinks, step, metrics | timers.pop())
        failed = agree(problem is not None)
        is_due = last or failed or best.step == step or logging.saves(step)
        if is_due and not save(step, is_last=last or failed):
            best = before
        if failed:
            raise problem or RuntimeError(f"rank 0 could not log step {step}")
        if last:
            break
    return reached(on_disk)


def _precision(engine: MegatronEngine, *, says: bool) -> dict[str, float]:
    """Metrics of the phases' precision; what changed is said on one rank."""
    phases, said = engine.precision.report()
    for sentence in said if says else ():
        logger.warning("%s", sentence)
    return {f"precision/{key}": value for key, value in phases.items()}


def _sampler(config: SupervisedConfig, data: Units, progress: Progress) -> PromptSampler:
    """Draws units from where a run continues."""
    return PromptSampler(
        data.num_units,
        config.batch.global_batch_size,
        config.model.seed,
        first_step=progress.step,
        consumed=progress.consumed,
        shuffles=data.shuffles,
    )


def _step(
    engine: MegatronEngine, task: SupervisedTask, data: Units, units: Sequence[int], average: WeightAverage | None
) -> dict[str, float]:
    """An optimizer step on these units, and one of the average; its metrics and its speed."""
    started = time.perf_counter()
    part, rows = data.of_units(units)
    batches = task.prepare(part, rows, engine.micro_batches(part.rows, rows))
    result = engine.step(batches, task.objective, denominator=task.denominator(part, rows))
    if average is not None:
        average.update()
    seconds = time.perf_counter() - started
    speed = {"tokens": float(part.rows.lengths[rows].sum()) / seconds, "samples": len(units) / seconds}
    metrics = {"time/step_seconds": seconds} | {f"perf/{name}_per_second": value for name, value in speed.items()}
    own = {"loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
    return metrics | {f"{task.name}/{name}": value for name, value in (own | task.metrics(result.metrics)).items()}


def _log(sinks: Sinks | None, step: int, metrics: dict[str, float]) -> Exception | None:
    """Log a step; the error, of which the other ranks must hear before the next collective, is returned."""
    try:
        if sinks is not None:
            sinks.log(step, metrics)
    except Exception as error:
        return error
    return None


def evaluate(
    engine: MegatronEngine, task: SupervisedTask, data: Units, batch_size: int, *, most: int | None = None
) -> dict[str, float]:
    """Loss and metrics of the data, so many units at a time, the first `most` of them; the same on every rank."""
    units = data.num_units if most is None else min(most, data.num_units)
    loss, denominator = 0.0, 0.0
    sums: dict[str, tuple[float, float]] = {}
    for first in range(0, units, batch_size):
        part, rows = data.of_units(range(first, min(first + batch_size, units)))
        batches = task.prepare(part, rows, engine.micro_batches(part.rows, rows))
        total, found = engine.evaluate(batches, task.objective)
        loss, denominator = loss + total, denominator + task.denominator(part, rows)
        for name, (value, count) in found.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + count)
    means = {name: value / count for name, (value, count) in sums.items() if count}
    return {"loss": loss / denominator} | task.metrics(means)


def memory(engine: MegatronEngine, name: str) -> dict[str, float]:
    """The most that each part of the model has held so far on one device, in GiB; all ranks call it."""
    held = engine.memory.largest_bytes()
    most = torch.tensor(list(held.values()), dtype=torch.float64, device=current_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {f"memory/{name}/{part}_gib": size / 2**30 for part, size in zip(held, most.tolist(), strict=True)}


def save_checkpoint(
    engine: MegatronEngine,
    logging: LoggingArguments,
    progress: Progress,
    identity: dict[str, Any],
    *,
    average: WeightAverage | None = None,
) -> None:
    """One complete checkpoint; every rank calls it.

    Raises:
        SaveFailedError: on every rank; nothing of it is left.
    """
    root, step, is_first = Path(logging.save) / "checkpoints", progress.step, dist.get_rank() == 0
    try:
        with checkpoint.agreed_write():
            if is_first:
                run_checkpoints.begin(root, step)
        staging = run_checkpoints.staging_directory(root, step)
        checkpoint.save_engine(engine, staging / "actor")
        if average is not None:
            average.save(staging / run_checkpoints.AVERAGE)
        with checkpoint.agreed_write():
            if is_first:
                state = {
                    "step": step,
                    "consumed": progress.consumed,
                    "identity": identity,
                    "config_entries": dict(progress.config_entries),
                    "best": asdict(progress.best),
                }
                run_checkpoints.commit(root, step, state, keep=logging.max_ckpt_num, most_gib=logging.max_ckpt_mem)
    except run_checkpoints.SaveFailedError as error:
        if is_first:
            run_checkpoints.abandon(root, step)
        raise run_checkpoints.save_failed(root, step, error) from error


def load(
    engine: MegatronEngine,
    logging: LoggingArguments,
    *,
    identity: dict[str, Any],
    average: WeightAverage | None = None,
) -> Progress:
    """Bring the engine to the latest checkpoint of the run that `logging.load` names; returns where it was."""
    with_optimizer = not logging.no_load_optim
    _, directory, state = run_checkpoints.latest(Path(str(logging.load)) / "checkpoints")
    run_checkpoints.check_identity(state.get("identity", {}), identity, directory, with_optimizer=with_optimizer)
    checkpoint.load_engine(engine, directory / "actor", with_optimizer=with_optimizer)
    if average is not None:
        average.load(directory / run_checkpoints.AVERAGE)
    return Progress(
        step=int(state["step"]),
        consumed=int(state["consumed"]),
        config_entries=state.get("config_entries", {}),
        best=Best.of_state(state),
    )


def agree(flag: bool) -> bool:
    """Rank 0's answer, on every rank."""
    answer = torch.tensor(float(flag), device=current_device())
    dist.broadcast(answer, 0)
    return bool(answer.item())
