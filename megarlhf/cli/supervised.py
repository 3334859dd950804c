"""What the supervised programs share: parse and check, then run."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from megarlhf.cli.errors import report_errors
from megarlhf.config.checks import check_supervised, raise_if
from megarlhf.config.command_line import parse
from megarlhf.config.supervised_arguments import SupervisedConfig


def run_program(config_class: type[SupervisedConfig], argv: Sequence[str] | None = None) -> int:
    """Parse and check, then run as one rank, or start the local ranks; returns the exit status."""
    arguments, prog = list(sys.argv[1:] if argv is None else argv), f"megarlhf {config_class.program}"
    config, dry_run = parse(config_class, arguments, prog=prog)
    return report_errors(prog, lambda: checked_run(config, arguments, dry_run=dry_run))


def checked_run(config: SupervisedConfig, arguments: list[str], *, dry_run: bool) -> int:
    """Run a configuration, or raise ConfigError with all that is wrong with it."""
    config = replace(config, logging=config.logging.continued())
    raise_if(check_supervised(config))
    from megarlhf.cli.run_supervised import run  # PyTorch and its like take seconds: mistakes are told before

    return run(config, arguments, dry_run=dry_run)
