"""`megarlhf merge_lora`: a model and its LoRA adapter made into one checkpoint; flags of OpenRLHF's lora_combiner.

megarlhf merge_lora --model_path models/llama --lora_path runs/sft/hf --output_path models/llama-sft
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarlhf.cli.errors import report_errors
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import parse


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """What to merge."""

    model_path: str
    """Local directory of the Hugging Face checkpoint that the adapter was trained beside."""
    lora_path: str
    """Directory of the PEFT adapter, such as a run's hf/."""
    output_path: str
    """Directory to make."""
    is_rm: bool = False
    """The model gives one score a sequence: a reward model or a critic."""
    bf16: bool = False
    """Store bfloat16. Off: the dtypes of model_path."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge a LoRA adapter into its model."""

    merge: MergeArguments


def main(argv: Sequence[str] | None = None, prog: str = "megarlhf merge_lora") -> int:
    """Parse and merge; returns the exit status."""
    config, dry_run = parse(MergeConfig, list(sys.argv[1:] if argv is None else argv), prog=prog)
    return report_errors(prog, lambda: _run(config.merge, dry_run=dry_run))


def _run(merge: MergeArguments, *, dry_run: bool) -> int:
    given = {"model_path": merge.model_path, "lora_path": merge.lora_path}
    raise_if([f"{option}={path} is not a local directory" for option, path in given.items() if not os.path.isdir(path)])
    from megarlhf.conversion.merge import merge_lora  # PyTorch takes seconds: mistakes in flags are told before

    model, lora, output = (Path(path) for path in (merge.model_path, merge.lora_path, merge.output_path))
    size = merge_lora(model, lora, output, is_reward_model=merge.is_rm, bf16=merge.bf16, dry_run=dry_run)
    print(f"model: {output}, {size / 2**30:.2f} GiB" + (" (not written: --dry-run)" if dry_run else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
