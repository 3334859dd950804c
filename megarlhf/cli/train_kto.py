"""Kahneman-Tversky optimisation: `megarlhf kto`, `python -m megarlhf.cli.train_kto`, or the latter under torchrun."""

import sys

from megarlhf.cli.programs import KTO as main

if __name__ == "__main__":
    sys.exit(main())
