"""The supervised loop: one process per rank, every rank runs it; the objective is a parameter."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarlhf.config.arguments import LoggingArguments, SFTConfig
from megarlhf.data.prompts import PromptSampler
from megarlhf.data.types import TrainingRow
from megarlhf.engine import checkpoint, checkpoint_files
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Objective
from megarlhf.metrics.sinks import Sinks
from megarlhf.metrics.timers import Timers
from megarlhf.parallel.device import current_device


def train(
    config: SFTConfig,
    engine: MegatronEngine,
    objective: Objective,
    rows: Sequence[TrainingRow],
    eval_rows: Sequence[TrainingRow] | None,
    sinks: Sinks | None,
    should_stop: Callable[[], bool],
    *,
    first_step: int,
    total_steps: int,
    identity: dict[str, Any],
) -> None:
    """Optimizer steps first_step + 1 .. total_steps over shuffled epochs of `rows`.

    Args:
        sinks: on rank 0; None elsewhere.
        should_stop: looked at on rank 0 after each step; a true answer saves and ends the run on every rank.
        identity: what a checkpoint must agree with to be loaded.
    """
    sampler = PromptSampler(len(rows), config.batch.global_batch_size, config.model.seed)
    timers, logging = Timers(), config.logging
    root = Path(logging.save) / "checkpoints"
    for step in range(first_step + 1, total_steps + 1):
        started = time.perf_counter()
        if sinks is not None:
            sinks.phase("train")
        batch = [rows[i] for i in sampler.batch(step - 1)]
        with timers("train"):
            result = engine.train_step(batch, objective, denominator=float(sum(row.num_targets for row in batch)))
        stopping = _agree(should_stop())
        last = step == total_steps or stopping
        metrics = {
            "sft/loss": result.loss,
            "sft/grad_norm": result.grad_norm,
            "sft/learning_rate": result.learning_rate,
            "data/epoch": sampler.epoch(step),
            **{f"sft/{name}": value for name, value in result.metrics.items()},
        }
        if eval_rows and (last or (logging.eval_interval and step % logging.eval_interval == 0)):
            with timers("eval"):
                metrics["sft/eval_loss"] = mean_loss(engine, eval_rows)
        seconds = time.perf_counter() - started
        metrics["time/step_seconds"] = seconds
        metrics["perf/tokens_per_second"] = sum(len(row.input_ids) for row in batch) / seconds
        metrics["perf/samples_per_second"] = len(batch) / seconds
        if sinks is not None:
            sinks.log(step, metrics | timers.pop())
        if last or (logging.save_interval and step % logging.save_interval == 0):
            with timers("save"):
                save(engine, root, step, keep=logging.max_ckpt_num, identity=identity)
        if stopping:
            return


def mean_loss(engine: MegatronEngine, rows: Sequence[TrainingRow]) -> float:
    """Cross-entropy per target over `rows`, in nats; the same on every rank."""
    total = sum(float(-log_probs.double().sum()) for log_probs in engine.log_probs(rows).values())
    summed = torch.tensor(total, dtype=torch.float64, device=current_device())
    dist.all_reduce(summed)
    return float(summed) / sum(row.num_targets for row in rows)


def save(engine: MegatronEngine, root: Path, step: int, *, keep: int, identity: dict[str, Any]) -> None:
    """One complete checkpoint; every rank calls it."""
    if dist.get_rank() == 0:
        checkpoint_files.begin(root, step)
    dist.barrier()
    checkpoint.save_engine(engine, checkpoint_files.partial_directory(root, step) / "actor")
    if dist.get_rank() == 0:
        checkpoint_files.commit(root, step, {"step": step, "identity": identity}, keep=keep)
    dist.barrier()


def load(engine: MegatronEngine, logging: LoggingArguments, *, identity: dict[str, Any]) -> int:
    """Bring the engine to the latest checkpoint of the run that `logging.load` names; returns its step."""
    with_optimizer = not logging.no_load_optim
    step, directory, state = checkpoint_files.latest(Path(str(logging.load)) / "checkpoints")
    checkpoint_files.check_identity(state.get("identity", {}), identity, directory, with_optimizer=with_optimizer)
    checkpoint.load_engine(engine, directory / "actor", with_optimizer=with_optimizer)
    return step


def _agree(flag: bool) -> bool:
    """Rank 0's answer, on every rank."""
    answer = torch.tensor(float(flag), device=current_device())
    dist.broadcast(answer, 0)
    return bool(answer.item())
