"""Supervised fine-tuning: `megarlhf sft`, `python -m megarlhf.cli.train_sft`, or the latter under torchrun."""

import sys
from collections.abc import Sequence

from megarlhf.cli.errors import report_errors
from megarlhf.config.checks import check_sft, raise_if
from megarlhf.config.command_line import parse
from megarlhf.config.supervised_arguments import SFTConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and check, then run as one rank, or start the local ranks; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config, dry_run = parse(SFTConfig, arguments, prog="megarlhf sft")
    return report_errors("megarlhf sft", lambda: _run(config, arguments, dry_run=dry_run))


def _run(config: SFTConfig, arguments: list[str], *, dry_run: bool) -> int:
    raise_if(check_sft(config))
    from megarlhf.cli.run_sft import run  # PyTorch and its like take seconds: mistakes are told before

    return run(config, arguments, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(main())
