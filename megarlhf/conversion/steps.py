"""What both directions of checkpoint conversion share: bytes at offsets, digests, bundles of work, the manifest.

Files are read and written at offsets instead of being mapped, so that memory holds what the threads work on, no more.
"""

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.conversion.cuts import GlobalWeight
from megarlhf.formats.run_checkpoints import LATEST
from megarlhf.formats.shared_memory import bytes_of
from megarlhf.formats.staging import StagingDirectory, check_staging, staging_path
from megarlhf.formats.threads import map_threads
from megarlhf.parallel.device import num_cores

MANIFEST = "conversion.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BUNDLE_BYTES = 64 * 2**20  # of one step that a rerun need not repeat
_SPARE_BYTES = 64 * 2**20  # of the disk, for everything but tensors
_SIDE_BYTES = 384 * 2**20  # of memory, for what is worked on beside the largest weight
Digests = dict[str, dict[str, Any]]  # HF name -> sha256, shape, dtype and source


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What applies to both directions."""

    threads: int
    dtype: torch.dtype | None = None  # of the target; None keeps the source's, of a run's checkpoint its pretrain's
    allow_nan: bool = False
    verify: bool = False
    overwrite: bool = False
    dry_run: bool = False
    progress: Callable[[str, int, int], None] = lambda phase, num_bytes, total: None  # bytes done since the last call


def default_threads() -> int:
    """Two for each core: each waits for the disk part of its time."""
    return 2 * num_cores()


class Memory:
    """What all threads together work in: as much as the largest piece of work takes, and 384 MiB.

    Buffers are lent again and again: pages that the system hands out anew cost as much as copying them.
    """

    def __init__(self, largest: int) -> None:
        self._limit, self._lent = largest + _SIDE_BYTES, 0
        self._spare: list[Tensor] = []  # given back, and together with what is lent within the limit
        self._turn, self._returned = threading.Lock(), threading.Condition()

    @contextmanager
    def lend(self, num_bytes: int, *, besides: int = 0) -> Iterator[Tensor]:
        """A buffer of arbitrary bytes. Who asks for more than is left waits, and whoever asks later waits behind.

        Args:
            besides: bytes that the work takes apart from the buffer.
        """
        with self._turn, self._returned:
            self._returned.wait_for(lambda: not self._lent or self._lent + num_bytes + besides <= self._limit)
            buffer = self._buffer(num_bytes, self._limit - self._lent - besides)
            size = len(buffer) + besides
            self._lent += size
        try:
            yield buffer[:num_bytes]
        finally:
            with self._returned:
                self._lent -= size
                self._spare.append(buffer)
                self._returned.notify()

    def _buffer(self, num_bytes: int, room: int) -> Tensor:
        """The smallest spare buffer that is not much too large, or a new one; the largest go where room lacks."""
        self._spare.sort(key=len)
        most = min(2 * num_bytes, room)
        fitting = next((i for i, spare in enumerate(self._spare) if num_bytes <= len(spare) <= most), None)
        buffer = torch.empty(num_bytes, dtype=torch.uint8) if fitting is None else self._spare.pop(fitting)
        while self._spare and sum(map(len, self._spare)) > room - len(buffer):
            self._spare.pop()
        return buffer


def digest(tensor: Tensor, source: str) -> dict[str, Any]:
    """A tensor's entry in the manifest."""
    sha256, dtype = hashlib.sha256(bytes_of(tensor)).hexdigest(), str(tensor.dtype).removeprefix("torch.")
    return {"sha256": sha256, "shape": list(tensor.shape), "dtype": dtype, "source": source}


def converted(name: str, tensor: Tensor, dtype: torch.dtype, *, allow_nan: bool) -> Tensor:
    """The tensor in the target's dtype.

    Raises:
        ValueError: it holds NaN, or numbers that the dtype cannot hold.
    """
    result = tensor.to(dtype)
    # One NaN makes the sum NaN; a sum in another dtype than the tensor's would be slow and copy it.
    if allow_nan or math.isfinite(float(result.sum())):
        return result
    if tensor.isnan().any():
        raise ValueError(f"{name} holds NaN: a broken model; --allow-nan converts it all the same")
    if result.isinf().any() and not tensor.isinf().any():
        raise ValueError(f"dtype={result.dtype}; {name} holds numbers beyond its range: use bf16 or fp32")
    return result


def bundles(weights: Sequence[GlobalWeight], num_bytes: Callable[[GlobalWeight], int]) -> dict[str, list[GlobalWeight]]:
    """Steps of work by name: neighbours of one pipeline stage, together large enough to be worth a note."""
    limit = max(_BUNDLE_BYTES, sum(map(num_bytes, weights)) // 256)
    found, size = list[list[GlobalWeight]](), limit
    for weight in weights:
        if size >= limit or found[-1][-1].stage != weight.stage:
            found.append([])
            size = 0
        found[-1].append(weight)
        size += num_bytes(weight)
    return {f"{bundle[0].stage}_{number}": bundle for number, bundle in enumerate(found)}


def run(
    bundles: dict[str, list[GlobalWeight]],
    function: Callable[[str, list[GlobalWeight]], Any],
    num_bytes: Callable[[GlobalWeight], int],
    *,
    phase: str,
    staging: StagingDirectory | None,
    options: ConvertOptions,
) -> None:
    """Do the steps in threads, the largest first, and note each in `staging`, whose earlier steps are left out."""
    sizes = {name: sum(map(num_bytes, bundle)) for name, bundle in bundles.items()}
    total = sum(sizes.values())
    done = staging.done if staging is not None else {}
    options.progress(phase, sum(sizes[name] for name in done), total)

    def step(name: str) -> None:
        record = function(name, bundles[name])
        if staging is not None:
            staging.note(name, record)
        options.progress(phase, sizes[name], total)

    order = sorted((name for name in bundles if name not in done), key=lambda name: -sizes[name])
    map_threads(step, order, options.threads)


def check_target(load: Path, save: Path, num_bytes: int, *, overwrite: bool) -> None:
    """Raises ValueError where a target of so many bytes may not be written to `save`, or has no room there."""
    if load.resolve().is_relative_to(save.resolve()):
        raise ValueError(f"save={save}; it holds what load={load} reads: give another directory")
    check_staging(save)
    if save.exists() and not overwrite:
        raise ValueError(f"save={save}; it exists already: give another directory, or --overwrite")
    if save.exists() and not any((save / name).exists() for name in (LATEST, "config.json")):
        raise ValueError(f"save={save}; it is no checkpoint, so --overwrite does not remove it: give another directory")
    parent = next(path for path in save.absolute().parents if path.exists())
    left = staging_path(save).rglob("*")  # by an earlier try: it counts as room
    free = shutil.disk_usage(parent).free + sum(path.stat().st_blocks * 512 for path in left)
    if free < num_bytes + _SPARE_BYTES:
        raise ValueError(
            f"save={save}; {parent} has {free / 1e9:.2f} GB free where the target takes "
            f"{(num_bytes + _SPARE_BYTES) / 1e9:.2f} GB: free space, or give a directory on another disk"
        )


def fingerprint(paths: Sequence[Path]) -> list[Any]:
    """Names, sizes and times of files, by which a rerun knows that they are the same."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def check_manifest(found: Iterator[tuple[str, Tensor]], manifest: Digests, target: str) -> None:
    """Digest tensors that were read back; raises ValueError naming those that differ from the manifest."""
    wrong = [name for name, tensor in found if digest(tensor, manifest[name]["source"]) != manifest[name]]
    if wrong:
        raise ValueError(f"{target}; read back, these differ from what was written: {wrong}")


def write_manifest(directory: Path, tensors: Digests, **about: Any) -> None:
    """conversion.json: what was converted from what, and the digest of every HF tensor."""
    content = {**about, "tensors": dict(sorted(tensors.items()))}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
