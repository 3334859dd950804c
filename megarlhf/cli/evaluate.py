"""A model measured on held-out prompts: `megarlhf eval` or `python -m megarlhf.cli.evaluate`."""

import sys

from megarlhf.cli.programs import EVAL as main

if __name__ == "__main__":
    sys.exit(main())
