"""Responses to prompts, into a file: `megarlhf generate` or `python -m megarlhf.cli.generate`."""

import sys
from collections.abc import Sequence

from megarlhf.cli.errors import report_errors
from megarlhf.config.check_loops import check_generate
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import parse
from megarlhf.config.loop_arguments import GenerateConfig


def main(argv: Sequence[str] | None = None, prog: str = "megarlhf generate") -> int:
    """Parse, check and generate; returns the exit status."""
    config, dry_run = parse(GenerateConfig, list(sys.argv[1:] if argv is None else argv), prog=prog)
    return report_errors(prog, lambda: _run(config, dry_run=dry_run))


def _run(config: GenerateConfig, *, dry_run: bool) -> int:
    raise_if(check_generate(config))
    from megarlhf.cli.run_generate import run  # PyTorch and its like take seconds: mistakes are told before

    return run(config, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(main())
