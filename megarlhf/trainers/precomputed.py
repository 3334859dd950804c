"""What another model makes of the rows, computed once for all runs: fields of the data, in files beside them."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import Floats, TargetValues, TrainingRows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Outputs
from megarlhf.engine.schedule import target_log_probs
from megarlhf.formats.huggingface import HFWeights
from megarlhf.parallel.device import current_device
from megarlhf.trainers.supervised import agree

UNITS_AT_ONCE = 1024  # of rows that are packed together
_logger = logging.getLogger(__name__)


def with_field(
    data: Sequence[SupervisedData],
    name: str,
    compute: Callable[[TrainingRows], Floats],
    *,
    width: int | None,
    model: str,
    directory: Path,
) -> list[SupervisedData]:
    """Data with one more field, read from a file of an earlier run or computed and written to one.

    The file's name has the fingerprint of what the numbers depend on: the model, and the data's tokens, in which the
    template and the tokenizer have left their marks; not the layout. Every rank calls it.

    Args:
        compute: gives the field of rows, on every rank.
        width: numbers of a target; None: one, without a dimension of its own.
        model: `checkpoint_digest` of what computes, on rank 0.
        directory: where the files lie; only rank 0 reads and writes there.
    Raises:
        OSError: the file cannot be written, on rank 0.
        ValueError: a file that does not hold the numbers of these rows, on rank 0.
    """
    first, completed = dist.get_rank() == 0, []
    for each in data:
        shape = (int(each.rows.num_targets.sum()), *([] if width is None else [width]))
        path = directory / f"{name}-{_digest(model, each.fingerprint)}.npy"
        values = _read(path, shape) if first else None
        if not agree(values is not None):
            values = compute(each.rows)
            if first:
                _write(path, values)
        completed.append(replace(each, rows=each.rows.with_fields({name: _from_first(values, shape)})))
    return completed


def computed(
    engine: MegatronEngine, rows: TrainingRows, *, width: int | None, compute: Outputs = target_log_probs
) -> Floats:
    """[targets] or [targets, width] of all rows on every rank, by the weights that the engine has now."""
    whole = torch.zeros(int(rows.num_targets.sum()), *([] if width is None else [width]), dtype=torch.float32)
    for start in range(0, rows.num_units, UNITS_AT_ONCE):
        indices = rows.of_units(range(start, min(start + UNITS_AT_ONCE, rows.num_units)))
        found: TargetValues = engine.forward(engine.micro_batches(rows, indices), compute=compute)
        if engine.ranks.holds_results:
            whole[found.indices] = torch.from_numpy(found.values)
    whole = whole.to(current_device())
    dist.all_reduce(whole)
    values: Floats = whole.cpu().numpy()
    return values


def checkpoint_digest(directory: str | Path, *more: str) -> str:
    """Of every byte of a checkpoint's config.json and weights, and of what else the numbers depend on; on rank 0."""
    if dist.get_rank() != 0:
        return ""
    found = hashlib.blake2b(" ".join(more).encode(), digest_size=16)
    for name in ("config.json", *HFWeights(directory).files):
        with (Path(directory) / name).open("rb") as file:
            while block := file.read(2**24):
                found.update(block)
    return found.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def _read(path: Path, shape: tuple[int, ...]) -> Floats | None:
    if not path.is_file():
        return None
    values: Floats = np.load(path)
    if values.dtype != np.float32 or values.shape != shape:
        raise ValueError(f"{path} holds {values.dtype} {values.shape}, not the data's float32 {shape}: remove it")
    _logger.info("%s: read, not computed", path)
    return values


def _write(path: Path, values: Floats) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".staged")
    with staged.open("wb") as file:
        np.save(file, values)
    os.replace(staged, path)


def _from_first(values: Floats | None, shape: tuple[int, ...]) -> Floats:
    whole = torch.empty(shape) if values is None else torch.from_numpy(np.ascontiguousarray(values))
    whole = whole.to(current_device())
    dist.broadcast(whole, 0)
    found: Floats = whole.cpu().numpy()
    return found
