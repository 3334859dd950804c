"""Responses to prompts, into a file: `megarlhf generate` or `python -m megarlhf.cli.generate`."""

import sys

from megarlhf.cli.programs import GENERATE as main

if __name__ == "__main__":
    sys.exit(main())
