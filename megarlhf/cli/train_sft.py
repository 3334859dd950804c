"""Supervised fine-tuning: `megarlhf sft`, `python -m megarlhf.cli.train_sft`, or the latter under torchrun."""

import sys

from megarlhf.cli.programs import SFT as main

if __name__ == "__main__":
    sys.exit(main())
