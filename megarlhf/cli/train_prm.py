"""Process reward model: `megarlhf prm`, `python -m megarlhf.cli.train_prm`, or the latter under torchrun."""

import sys

from megarlhf.cli.programs import PRM as main

if __name__ == "__main__":
    sys.exit(main())
