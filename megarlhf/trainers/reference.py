"""Log-probs of a reference beside the rows that are trained on: in each step, or once before training."""

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megarlhf.data.packing import add_values
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import Floats, Ints, MicroBatch, TrainingRows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.formats.huggingface import HFWeights
from megarlhf.parallel.device import current_device
from megarlhf.trainers.supervised import Prepare, agree

REF_LOG_PROBS = "ref_log_probs"
_UNITS_AT_ONCE = 1024  # of rows that are packed together
_logger = logging.getLogger(__name__)


def reference_log_probs(engine: MegatronEngine) -> Prepare:
    """Adds the field of that name, computed by the engine's reference unless the data has it."""

    def prepare(data: SupervisedData, rows: Ints, batches: list[MicroBatch]) -> list[MicroBatch]:
        if REF_LOG_PROBS in data.rows.fields:
            return batches
        with engine.reference_weights():
            return add_values(batches, REF_LOG_PROBS, engine.forward(batches))

    return prepare


def with_reference_log_probs(
    engine: MegatronEngine, data: Sequence[SupervisedData], *, ref_pretrain: str | None, directory: Path
) -> list[SupervisedData]:
    """Data with the field of that name, read from a file of an earlier run or computed and written to one.

    The file's name has the fingerprint of what the numbers depend on: every byte of the reference's config.json and
    weights, the precision, and the data's tokens, in which the template and the tokenizer have left their marks; not
    the layout. Every rank calls it, while the engine's weights are still the start's.

    Args:
        ref_pretrain: checkpoint of the reference; None: the engine's present weights, which are those of its pretrain.
        directory: where the files lie; only rank 0 reads and writes there.
    Raises:
        OSError: the file cannot be written, on rank 0.
        ValueError: a file that does not hold the log-probs of these rows, on rank 0.
    """
    first = dist.get_rank() == 0
    model = _digest(ref_pretrain or engine.pretrain, bf16=engine.config.bf16) if first else ""
    if ref_pretrain is not None:
        engine.keep_reference(ref_pretrain)
    completed = []
    for each in data:
        path = directory / f"{REF_LOG_PROBS}-{_key(model, each.fingerprint)}.npy"
        values = _read(path, each.rows) if first else None
        if not agree(values is not None):
            with nullcontext() if ref_pretrain is None else engine.reference_weights():
                values = _compute(engine, each.rows)
            if first:
                _write(path, values)
        values = _from_first(values, int(each.rows.num_targets.sum()))
        completed.append(replace(each, rows=each.rows.with_fields({REF_LOG_PROBS: values})))
    if ref_pretrain is not None:
        engine.drop_reference()
    return completed


def _digest(directory: str | Path, *, bf16: bool) -> str:
    """Of a checkpoint's bytes."""
    found = hashlib.blake2b(f"bf16={bf16}".encode(), digest_size=16)
    for name in ("config.json", *HFWeights(directory).files):
        with (Path(directory) / name).open("rb") as file:
            while block := file.read(2**24):
                found.update(block)
    return found.hexdigest()


def _key(*parts: str) -> str:
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def _compute(engine: MegatronEngine, rows: TrainingRows) -> Floats:
    """[targets] log-probs of the weights that the engine has now, on every rank."""
    whole = torch.zeros(int(rows.num_targets.sum()), dtype=torch.float32)
    for start in range(0, rows.num_units, _UNITS_AT_ONCE):
        indices = rows.of_units(range(start, min(start + _UNITS_AT_ONCE, rows.num_units)))
        found = engine.forward(engine.micro_batches(rows, indices))
        if engine.ranks.holds_results:
            whole[found.indices] = torch.from_numpy(found.values)
    whole = whole.to(current_device())
    dist.all_reduce(whole)
    values: Floats = whole.cpu().numpy()
    return values


def _read(path: Path, rows: TrainingRows) -> Floats | None:
    if not path.is_file():
        return None
    values: Floats = np.load(path)
    if values.dtype != np.float32 or values.shape != (int(rows.num_targets.sum()),):
        raise ValueError(f"{path} holds {values.dtype} {values.shape}, not the data's log-probs: remove it")
    _logger.info("reference log-probs: those of %s", path)
    return values


def _write(path: Path, values: Floats) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".staged")
    with staged.open("wb") as file:
        np.save(file, values)
    os.replace(staged, path)


def _from_first(values: Floats | None, size: int) -> Floats:
    whole = torch.empty(size) if values is None else torch.from_numpy(np.ascontiguousarray(values))
    whole = whole.to(current_device())
    dist.broadcast(whole, 0)
    found: Floats = whole.cpu().numpy()
    return found
