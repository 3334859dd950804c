"""Direct preference optimisation: `megarlhf dpo`, `python -m megarlhf.cli.train_dpo`, or the latter under torchrun."""

import sys

from megarlhf.cli.programs import DPO as main

if __name__ == "__main__":
    sys.exit(main())
