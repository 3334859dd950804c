"""Rewards of the samples of a file: `megarlhf score` or `python -m megarlhf.cli.score`."""

import sys

from megarlhf.cli.programs import SCORE as main

if __name__ == "__main__":
    sys.exit(main())
