"""Reward model: `megarlhf rm`, `python -m megarlhf.cli.train_rm`, or the latter under torchrun."""

import sys

from megarlhf.cli.programs import RM as main

if __name__ == "__main__":
    sys.exit(main())
