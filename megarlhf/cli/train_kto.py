"""Kahneman-Tversky optimisation: `megarlhf kto`, `python -m megarlhf.cli.train_kto`, or the latter under torchrun."""

import sys
from functools import partial

from megarlhf.cli.supervised import run_program
from megarlhf.config.supervised_arguments import KTOConfig

main = partial(run_program, KTOConfig)

if __name__ == "__main__":
    sys.exit(main())
