"""Reward model: `megarlhf rm`, `python -m megarlhf.cli.train_rm`, or the latter under torchrun."""

import sys
from collections.abc import Sequence

from megarlhf.cli.supervised import run_program
from megarlhf.config.reward_model_arguments import RMConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run_program("rm", RMConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
