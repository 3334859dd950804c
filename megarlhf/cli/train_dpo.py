"""Direct preference optimisation: `megarlhf dpo`, `python -m megarlhf.cli.train_dpo`, or the latter under torchrun."""

import sys
from functools import partial

from megarlhf.cli.supervised import run_program
from megarlhf.config.supervised_arguments import DPOConfig

main = partial(run_program, DPOConfig)

if __name__ == "__main__":
    sys.exit(main())
