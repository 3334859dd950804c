"""Rewards of the samples of a file: `megarlhf score` or `python -m megarlhf.cli.score`."""

import sys
from collections.abc import Sequence

from megarlhf.cli.errors import report_errors
from megarlhf.config.check_loops import check_score
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import parse
from megarlhf.config.loop_arguments import ScoreConfig


def main(argv: Sequence[str] | None = None, prog: str = "megarlhf score") -> int:
    """Parse, check and score; returns the exit status."""
    config, dry_run = parse(ScoreConfig, list(sys.argv[1:] if argv is None else argv), prog=prog)
    return report_errors(prog, lambda: _run(config, dry_run=dry_run))


def _run(config: ScoreConfig, *, dry_run: bool) -> int:
    raise_if(check_score(config))
    from megarlhf.cli.run_score import run  # PyTorch and its like take seconds: mistakes are told before

    return run(config, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(main())
