"""Reward model: `megarlhf rm`, `python -m megarlhf.cli.train_rm`, or the latter under torchrun."""

import sys
from functools import partial

from megarlhf.cli.supervised import run_program
from megarlhf.config.reward_model_arguments import RMConfig

main = partial(run_program, RMConfig)

if __name__ == "__main__":
    sys.exit(main())
