"""Direct preference optimisation: `megarlhf dpo`, `python -m megarlhf.cli.train_dpo`, or the latter under torchrun."""

import sys
from collections.abc import Sequence

from megarlhf.cli.supervised import run_program
from megarlhf.config.supervised_arguments import DPOConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run_program("dpo", DPOConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
