"""Rejection sampling, iterative DPO and conditional SFT: `megarlhf iterate` or `python -m megarlhf.cli.iterate`."""

import sys
from collections.abc import Sequence

from megarlhf.cli.errors import report_errors
from megarlhf.config.check_loops import check_iterate
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import parse
from megarlhf.config.loop_arguments import IterateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check and run the rounds; returns the exit status."""
    config, dry_run = parse(IterateConfig, list(sys.argv[1:] if argv is None else argv), prog="megarlhf iterate")
    return report_errors("megarlhf iterate", lambda: _run(config, dry_run=dry_run))


def _run(config: IterateConfig, *, dry_run: bool) -> int:
    raise_if(check_iterate(config))
    from megarlhf.cli.run_iterate import run  # PyTorch and its like take seconds: mistakes are told before

    return run(config, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(main())
