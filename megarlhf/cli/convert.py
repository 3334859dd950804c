"""`megarlhf convert hf-to-megatron|megatron-to-hf`: checkpoints between Hugging Face and Megatron-Core.

megarlhf convert hf-to-megatron --load models/smollm2 --save models/smollm2-megatron
megarlhf convert megatron-to-hf --load runs/ppo@10 --save models/ppo-step-10 --role actor --dtype bf16
"""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from megarlhf.cli.errors import report_errors
from megarlhf.config.check_save import directory_errors
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import parse

if TYPE_CHECKING:
    from megarlhf.conversion.steps import ConvertOptions

_M_ARENA_MAX = -8  # of glibc's malloc.h


@dataclass(frozen=True, kw_only=True)
class SharedArguments:
    """What both directions take."""

    save: str
    """Directory to make. It appears when it is complete; until then SAVE.partial holds what is done, and the same
    command goes on from there."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype of the result, but for a router's fixed bias, which stays as it is. None: as stored, bit for bit; for a
    run's own checkpoint the dtype of its pretrain, as in its hf/."""
    verify: bool = False
    """Read the result back and compare it with the SHA-256 of every tensor before it takes its place."""
    overwrite: bool = False
    """Replace a checkpoint at SAVE."""
    allow_nan: bool = False
    """Convert weights that hold NaN."""
    num_threads: int | None = None
    """Tensors worked on at once, as long as they take no more memory than the largest and 384 MiB together. None: two
    for each core, as each waits for the disk part of its time."""


@dataclass(frozen=True, kw_only=True)
class ToMegatronArguments:
    """What to read, and for which layout."""

    load: str
    """Local directory of the Hugging Face checkpoint."""
    target_tensor_parallel_size: int = 1
    """Tensor-parallel size to cut tensors for; any other loads as well, at the price of reading parts of chunks."""
    target_pipeline_parallel_size: int = 1
    """Pipeline stages to keep in files of their own."""
    target_expert_parallel_size: int = 1
    """Expert-parallel size to cut experts for."""
    head: Literal["lm", "value"] | None = None
    """Output layer: vocabulary logits, or one value per token. None: value for a sequence classifier, else lm. value
    also starts a critic from a causal language model, with a drawn head."""


@dataclass(frozen=True, kw_only=True)
class ToHFArguments:
    """What to read, and what the checkpoint does not say."""

    load: str
    """DIR or DIR@iteration of a Megatron checkpoint or of a run (--save of a training program)."""
    role: Literal["actor", "critic"] = "actor"
    """Which model of a run's checkpoint."""
    hf_model: str | None = None
    """Directory with config.json and tokenizer. None: the checkpoint's hf_config/, or the run's pretrain."""
    max_shard_size: str = "5GB"
    """Size of a weight file at most, such as 5GB or 500MiB; a larger tensor has a file of its own."""


@dataclass(frozen=True, kw_only=True)
class HFToMegatron:
    """A Hugging Face checkpoint as Megatron-Core's (torch_dist)."""

    source: ToMegatronArguments
    target: SharedArguments


@dataclass(frozen=True, kw_only=True)
class MegatronToHF:
    """A Megatron-Core checkpoint (torch_dist) as Hugging Face's."""

    source: ToHFArguments
    target: SharedArguments


def hf_to_megatron(argv: Sequence[str] | None = None, prog: str = "convert_hf_to_megatron.py") -> int:
    """Parse and convert; returns the exit status."""
    config, dry_run = parse(HFToMegatron, sys.argv[1:] if argv is None else argv, prog=prog)
    source = config.source

    def convert(options: "ConvertOptions") -> None:
        from megarlhf.conversion.to_megatron import hf_to_megatron as convert

        convert(
            Path(source.load),
            Path(config.target.save),
            tensor=source.target_tensor_parallel_size,
            pipeline=source.target_pipeline_parallel_size,
            expert=source.target_expert_parallel_size,
            head=source.head,
            options=options,
        )

    return report_errors(prog, lambda: _run(config.target, convert, dry_run=dry_run))


def megatron_to_hf(argv: Sequence[str] | None = None, prog: str = "convert_megatron_to_hf.py") -> int:
    """Parse and convert; returns the exit status."""
    config, dry_run = parse(MegatronToHF, sys.argv[1:] if argv is None else argv, prog=prog)
    source = config.source

    def convert(options: "ConvertOptions") -> None:
        from megarlhf.conversion.to_hf import megatron_to_hf as convert

        convert(
            source.load,
            Path(config.target.save),
            hf_model=source.hf_model,
            role=source.role,
            max_shard_bytes=num_bytes_of(source.max_shard_size),
            options=options,
        )

    return report_errors(prog, lambda: _run(config.target, convert, dry_run=dry_run))


def main(argv: Sequence[str] | None = None) -> int:
    """`hf-to-megatron` or `megatron-to-hf` with its flags; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    directions = {"hf-to-megatron": hf_to_megatron, "megatron-to-hf": megatron_to_hf}
    direction = arguments[0].replace("_", "-") if arguments else ""
    if direction not in directions:
        known = direction in ("-h", "--help")
        usage = f"usage: megarlhf convert {'|'.join(directions)} [flags]; --help lists the flags"
        print(usage, file=sys.stdout if known else sys.stderr)
        return 0 if known else 2
    return directions[direction](arguments[1:], f"megarlhf convert {direction}")


def prepare_process() -> None:
    """Set what PyTorch reads when it is imported; afterwards it is too late, and no harm done.

    Conversion is the CPU's work: Megatron-Core's own layers say the shapes, and large pages halve the system's time.
    Each arena of malloc keeps some of what its threads freed: with few, memory does not grow with the threads.
    """
    if "torch" not in sys.modules:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "THP_MEM_ALLOC_ENABLE": "1"}
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 4)


def _run(target: SharedArguments, convert: Callable[["ConvertOptions"], None], *, dry_run: bool) -> int:
    prepare_process()
    errors = directory_errors(target.save) or directory_errors(f"{os.path.normpath(target.save)}.partial")
    if target.num_threads is not None and target.num_threads < 1:
        errors.append(f"num_threads={target.num_threads}; at least 1")
    raise_if(errors)
    from megarlhf.conversion.steps import DTYPES, ConvertOptions, default_threads

    with _Bar() as bar:
        convert(
            ConvertOptions(
                threads=target.num_threads or default_threads(),
                dtype=DTYPES[target.dtype] if target.dtype else None,
                allow_nan=target.allow_nan,
                verify=target.verify,
                overwrite=target.overwrite,
                dry_run=dry_run,
                progress=bar.count,
            )
        )
    checked = ", verified" if target.verify else ""
    print(f"{target.save}: {'would be made' if dry_run else f'complete{checked}'}")
    return 0


def num_bytes_of(size: str) -> int:
    """Bytes of a size such as 5GB or 500MiB.

    Raises:
        ValueError: not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", size, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"max_shard_size={size}; a number with KB, MB, GB or TB, or KiB, MiB, ...")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


class _Bar(Progress):
    """Bytes done and GB/s of each phase, on stderr."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:8}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._phases: dict[str, TaskID] = {}

    def count(self, phase: str, num_bytes: int, total: int) -> None:
        """Count bytes of a phase; the first call of a phase, with what an earlier process did, starts its clock."""
        if phase not in self._phases:
            self._phases[phase] = self.add_task(phase, total=total, completed=num_bytes)
        else:
            self.update(self._phases[phase], advance=num_bytes)


if __name__ == "__main__":
    sys.exit(main())
