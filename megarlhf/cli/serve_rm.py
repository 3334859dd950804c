"""Rewards over HTTP: `megarlhf serve-rm` or `python -m megarlhf.cli.serve_rm`."""

import sys
from collections.abc import Sequence

from megarlhf.cli.errors import report_errors
from megarlhf.config.check_serve import serve_errors
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import parse
from megarlhf.config.serve_arguments import ServeConfig


def main(argv: Sequence[str] | None = None, prog: str = "megarlhf serve-rm") -> int:
    """Parse, check and serve until a signal; returns the exit status."""
    config, dry_run = parse(ServeConfig, list(sys.argv[1:] if argv is None else argv), prog=prog)
    return report_errors(prog, lambda: _run(config, prog, dry_run=dry_run))


def _run(config: ServeConfig, prog: str, *, dry_run: bool) -> int:
    raise_if(serve_errors(config))
    from megarlhf.cli.run_serve import run  # PyTorch takes seconds: mistakes in flags are told before

    return run(config, prog, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(main())
