"""Knowledge distillation: `megarlhf kd`, `python -m megarlhf.cli.train_kd`, or the latter under torchrun."""

import sys

from megarlhf.cli.programs import KD as main

if __name__ == "__main__":
    sys.exit(main())
