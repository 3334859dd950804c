"""How a program starts whose configuration is checked before PyTorch is imported."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from megarlhf.cli.errors import report_errors
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import parse


def run_checked(
    name: str,
    config_class: type[Any],
    check: Callable[[Any], list[str]],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> int:
    """Parse, check, and call `run` of this folder's run_<name>; returns the exit status."""
    prog = prog or f"megarlhf {name}"
    config, dry_run = parse(config_class, list(sys.argv[1:] if argv is None else argv), prog=prog)

    def run() -> int:
        raise_if(check(config))
        return int(import_module(f"megarlhf.cli.run_{name}").run(config, dry_run=dry_run))

    return report_errors(prog, run)
