"""Process reward model: `megarlhf prm`, `python -m megarlhf.cli.train_prm`, or the latter under torchrun."""

import sys
from collections.abc import Sequence

from megarlhf.cli.supervised import run_program
from megarlhf.config.reward_model_arguments import PRMConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run_program("prm", PRMConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
