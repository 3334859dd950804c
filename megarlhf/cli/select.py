"""Training data of scored samples: `megarlhf select` or `python -m megarlhf.cli.select`."""

import sys

from megarlhf.cli.programs import SELECT as main

if __name__ == "__main__":
    sys.exit(main())
