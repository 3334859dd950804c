"""Rejection sampling, iterative DPO and conditional SFT: `megarlhf iterate` or `python -m megarlhf.cli.iterate`."""

import sys

from megarlhf.cli.programs import ITERATE as main

if __name__ == "__main__":
    sys.exit(main())
