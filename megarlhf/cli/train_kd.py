"""Knowledge distillation: `megarlhf kd`, `python -m megarlhf.cli.train_kd`, or the latter under torchrun."""

import sys
from functools import partial

from megarlhf.cli.supervised import run_program
from megarlhf.config.kd_arguments import KDConfig

main = partial(run_program, KDConfig)

if __name__ == "__main__":
    sys.exit(main())
