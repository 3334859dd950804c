"""The supervised loop: one process per rank, every rank runs it; the objective is a parameter."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megarlhf.config.arguments import LoggingArguments
from megarlhf.config.supervised_arguments import SFTConfig
from megarlhf.data.prompts import PromptSampler
from megarlhf.data.types import TrainingRows
from megarlhf.engine import checkpoint
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import NonFiniteError, Objective
from megarlhf.formats import run_checkpoints
from megarlhf.metrics.sinks import Sinks
from megarlhf.metrics.timers import Timers
from megarlhf.parallel.device import current_device


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run continues."""

    step: int = 0  # last finished step
    consumed: int = 0  # rows drawn so far


def train(
    config: SFTConfig,
    engine: MegatronEngine,
    objective: Objective,
    rows: TrainingRows,
    eval_rows: TrainingRows | None,
    sinks: Sinks | None,
    should_stop: Callable[[], bool],
    *,
    progress: Progress,
    total_steps: int,
    identity: dict[str, Any],
) -> None:
    """Optimizer steps progress.step + 1 .. total_steps over shuffled epochs of `rows`.

    Args:
        sinks: on rank 0; None elsewhere.
        should_stop: looked at on rank 0 after each step; a true answer saves and ends the run on every rank.
        identity: what a checkpoint must agree with to be loaded.
    Raises:
        NonFiniteError: a loss or gradient that is not finite; the step before it is saved.
        RuntimeError: rank 0 could not log a step (there it is the cause that is raised); the step is saved.
    """
    timers, logging = Timers(), config.logging
    sampler = PromptSampler(
        len(rows),
        config.batch.global_batch_size,
        config.model.seed,
        first_step=progress.step,
        consumed=progress.consumed,
    )
    saved = progress.step

    def save(step: int) -> None:
        nonlocal saved
        if step != saved:
            with timers("save"):
                save_checkpoint(engine, logging, Progress(step=step, consumed=sampler.consumed(step)), identity)
            saved = step

    for step in range(progress.step + 1, total_steps + 1):
        started = time.perf_counter()
        if sinks is not None:
            sinks.phase("train")
        batch = sampler.batch(step - 1)
        try:
            with timers("train"):
                denominator = float(rows.num_targets[batch].sum())
                result = engine.step(engine.micro_batches(rows, batch), objective, denominator=denominator)
        except NonFiniteError:  # on every rank, and the weights are still those of the step before
            save(step - 1)
            raise
        seconds = time.perf_counter() - started
        metrics = {
            "sft/loss": result.loss,
            "sft/grad_norm": result.grad_norm,
            "sft/learning_rate": result.learning_rate,
            "data/epoch": sampler.epoch(step),
            **{f"sft/{name}": value for name, value in result.metrics.items()},
            "time/step_seconds": seconds,
            "perf/tokens_per_second": float(rows.lengths[batch].sum()) / seconds,
            "perf/samples_per_second": len(batch) / seconds,
        }
        if step == progress.step + 1:
            metrics |= memory(engine)
        stopping = _agree(should_stop())
        last = step == total_steps or stopping
        if eval_rows is not None and (last or (logging.eval_interval and step % logging.eval_interval == 0)):
            with timers("eval"):
                metrics["sft/eval_loss"] = mean_loss(engine, eval_rows)
        problem = _log(sinks, step, metrics | timers.pop())
        failed = _agree(problem is not None)
        if last or failed or (logging.save_interval and step % logging.save_interval == 0):
            save(step)
        if failed:
            raise problem or RuntimeError(f"rank 0 could not log step {step}")
        if stopping:
            return


def _log(sinks: Sinks | None, step: int, metrics: dict[str, float]) -> Exception | None:
    """Log a step; the error, of which the other ranks must hear before the next collective, is returned."""
    try:
        if sinks is not None:
            sinks.log(step, metrics)
    except Exception as error:
        return error
    return None


def mean_loss(engine: MegatronEngine, rows: TrainingRows) -> float:
    """Cross-entropy per target over `rows`, in nats; the same on every rank."""
    found = engine.log_probs(rows).values
    total = -found.sum(dtype=np.float64) if engine.ranks.holds_results else 0.0
    summed = torch.tensor(total, dtype=torch.float64, device=current_device())
    dist.all_reduce(summed)
    return float(summed) / int(rows.num_targets.sum())


def memory(engine: MegatronEngine) -> dict[str, float]:
    """The most that each part of the model has held so far on one device, in GiB; all ranks call it."""
    held = engine.memory.largest_bytes()
    most = torch.tensor(list(held.values()), dtype=torch.float64, device=current_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {f"memory/sft/{part}_gib": size / 2**30 for part, size in zip(held, most.tolist(), strict=True)}


def save_checkpoint(
    engine: MegatronEngine, logging: LoggingArguments, progress: Progress, identity: dict[str, Any]
) -> None:
    """One complete checkpoint; every rank calls it."""
    root, step = Path(logging.save) / "checkpoints", progress.step
    if dist.get_rank() == 0:
        run_checkpoints.begin(root, step)
    dist.barrier()
    try:
        checkpoint.save_engine(engine, run_checkpoints.staging_directory(root, step) / "actor")
        if dist.get_rank() == 0:
            state = {"step": step, "consumed": progress.consumed, "identity": identity}
            run_checkpoints.commit(root, step, state, keep=logging.max_ckpt_num)
    except OSError:
        run_checkpoints.abandon(root, step)
        raise
    dist.barrier()


def load(engine: MegatronEngine, logging: LoggingArguments, *, identity: dict[str, Any]) -> Progress:
    """Bring the engine to the latest checkpoint of the run that `logging.load` names; returns where it was."""
    with_optimizer = not logging.no_load_optim
    _, directory, state = run_checkpoints.latest(Path(str(logging.load)) / "checkpoints")
    run_checkpoints.check_identity(state.get("identity", {}), identity, directory, with_optimizer=with_optimizer)
    checkpoint.load_engine(engine, directory / "actor", with_optimizer=with_optimizer)
    return Progress(step=int(state["step"]), consumed=int(state["consumed"]))


def _agree(flag: bool) -> bool:
    """Rank 0's answer, on every rank."""
    answer = torch.tensor(float(flag), device=current_device())
    dist.broadcast(answer, 0)
    return bool(answer.item())
