"""Knowledge distillation: `megarlhf kd`, `python -m megarlhf.cli.train_kd`, or the latter under torchrun."""

import sys
from collections.abc import Sequence

from megarlhf.cli.supervised import run_program
from megarlhf.config.kd_arguments import KDConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run_program("kd", KDConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
