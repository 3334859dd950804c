"""Process reward model: `megarlhf prm`, `python -m megarlhf.cli.train_prm`, or the latter under torchrun."""

import sys
from functools import partial

from megarlhf.cli.supervised import run_program
from megarlhf.config.reward_model_arguments import PRMConfig

main = partial(run_program, PRMConfig)

if __name__ == "__main__":
    sys.exit(main())
