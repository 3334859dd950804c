"""Kahneman-Tversky optimisation: `megarlhf kto`, `python -m megarlhf.cli.train_kto`, or the latter under torchrun."""

import sys
from collections.abc import Sequence

from megarlhf.cli.supervised import run_program
from megarlhf.config.supervised_arguments import KTOConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run_program("kto", KTOConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
