"""Does a layout give the one-process result for a model? `megarlhf parity --pretrain DIR --context-parallel-size 2 ...`

Runs the model in one process in float32, then in the layout, on the same random sequences, and prints the largest
differences. Exit status 1 where one is past its tolerance. With --bf16 one process runs in bfloat16 in between: how far
it is off says how far a layout may be.
"""

import sys
from collections.abc import Sequence

from megarlhf.cli.errors import report_errors
from megarlhf.config.checks import check_parity, raise_if
from megarlhf.config.command_line import parse
from megarlhf.config.supervised_arguments import ParityConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and check; start the ranks, or compute as one of them; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config, dry_run = parse(ParityConfig, arguments, prog="megarlhf parity")
    return report_errors("megarlhf parity", lambda: _run(config, arguments, dry_run=dry_run))


def _run(config: ParityConfig, arguments: list[str], *, dry_run: bool) -> int:
    raise_if(check_parity(config))
    from megarlhf.cli.run_parity import run  # PyTorch and its like take seconds: mistakes are told before

    return run(config, arguments, dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(main())
