"""Supervised fine-tuning: `megarlhf sft`, `python -m megarlhf.cli.train_sft`, or the latter under torchrun."""

import sys
from functools import partial

from megarlhf.cli.supervised import run_program
from megarlhf.config.supervised_arguments import SFTConfig

main = partial(run_program, SFTConfig)

if __name__ == "__main__":
    sys.exit(main())
