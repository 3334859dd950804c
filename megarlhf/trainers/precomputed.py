"""What another model makes of the rows, computed once for all runs: fields of the data, in files beside them."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
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

UNITS_AT_ONCE = 256  # of rows that are packed together, and whose numbers rank 0 holds at once
_logger = logging.getLogger(__name__)


def with_field(
    data: Sequence[SupervisedData],
    name: str,
    compute: Callable[[TrainingRows], Iterator[Floats]],
    *,
    width: int | None,
    model: str,
    directory: Path,
) -> list[SupervisedData]:
    """Data with one more field, which is a file that every rank maps: of an earlier run, or computed now.

    The file's name has the fingerprint of what the numbers depend on: the model, and the data's tokens, in which the
    template and the tokenizer have left their marks; not the layout. Every rank calls it.

    Args:
        compute: gives the field of rows, block after block, on rank 0; every rank iterates.
        width: numbers of a target; None: one, without a dimension of its own.
        model: `checkpoint_digest` of what computes, on rank 0.
        directory: where the files lie, which every host sees; only rank 0 writes there.
    Raises:
        OSError: the file cannot be written, on rank 0.
        ValueError: a file that does not hold the numbers of these rows.
    """
    completed = []
    for each in data:
        shape = (int(each.rows.num_targets.sum()), *([] if width is None else [width]))
        own = _digest(model, each.fingerprint) if dist.get_rank() == 0 else ""  # which reads all of the data
        path = directory / _from_first(f"{name}-{own}.npy")
        if not agree(path.is_file()):
            _write(path, shape, compute(each.rows))
            dist.barrier()
        elif dist.get_rank() == 0:
            _logger.info("%s: read, not computed", path)
        completed.append(replace(each, rows=each.rows.with_fields({name: _mapped(path, shape)})))
    return completed


def computed(
    engine: MegatronEngine, rows: TrainingRows, *, width: int | None, compute: Outputs = target_log_probs
) -> Iterator[Floats]:
    """[targets] or [targets, width] of so many units after the other on rank 0, by the weights that the engine has."""
    first_target = 0
    for start in range(0, rows.num_units, UNITS_AT_ONCE):
        indices = rows.of_units(range(start, min(start + UNITS_AT_ONCE, rows.num_units)))
        found: TargetValues = engine.forward(engine.micro_batches(rows, indices), compute=compute)
        count = int(rows.num_targets[indices].sum())
        block = torch.zeros(count, *([] if width is None else [width]), dtype=torch.float32)
        if engine.ranks.holds_results:
            block[found.indices - first_target] = torch.from_numpy(found.values)
        block = block.to(current_device())
        dist.reduce(block, 0)
        first_target += count
        yield block.cpu().numpy()


def checkpoint_digest(directory: str | Path, engine: MegatronEngine, *more: str) -> str:
    """Of a checkpoint's config.json and tensors, and of what else the numbers depend on; on rank 0.

    Of each tensor that is its name, shape, dtype and first row (HFWeights.fingerprint), which takes no time for a large
    model: it cannot tell weights apart that differ in other rows alone, as after an edit of a few tokens' embeddings.

    Args:
        engine: the trained one, whose dtype is the other model's too, in passes without gradients.
        more: such as how the numbers are taken.
    """
    if dist.get_rank() != 0:
        return ""
    config = (Path(directory) / "config.json").read_text(encoding="utf-8")
    computed = (f"bf16={engine.config.bf16}", *engine.precision.identity())
    return _digest(*computed, *more, config, HFWeights(directory).fingerprint())


def _digest(*parts: str) -> str:
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def _write(path: Path, shape: tuple[int, ...], blocks: Iterator[Floats]) -> None:
    """Rank 0 writes what every rank computes; the file has its name when it is whole."""
    staged, whole, place = path.with_suffix(f".{os.getpid()}.staged"), None, 0  # another run may write the same
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = np.lib.format.open_memmap(staged, mode="w+", dtype=np.float32, shape=shape)
        with staged.open("r+b") as file:  # a full disk is an error here, and a fatal signal at the map
            os.posix_fallocate(file.fileno(), 0, staged.stat().st_size)
    for block in blocks:
        if whole is not None:
            whole[place : place + len(block)] = block
        place += len(block)
    if whole is not None:
        whole.flush()
        os.replace(staged, path)


def _mapped(path: Path, shape: tuple[int, ...]) -> Floats:
    values: Floats = np.load(path, mmap_mode="r").view(np.ndarray)
    if values.dtype != np.float32 or values.shape != shape:
        raise ValueError(f"{path} holds {values.dtype} {values.shape}, not the data's float32 {shape}: remove it")
    return values


def _from_first(name: str) -> str:
    """Rank 0's, on every rank."""
    names = [name]
    dist.broadcast_object_list(names, 0)
    return names[0]
