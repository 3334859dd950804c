"""Rejection sampling, iterative DPO and conditional SFT: `megarlhf iterate` or `python -m megarlhf.cli.iterate`."""

import sys
from functools import partial

from megarlhf.cli.checked import run_checked
from megarlhf.config.check_loops import check_iterate
from megarlhf.config.loop_arguments import IterateConfig

main = partial(run_checked, "iterate", IterateConfig, check_iterate)

if __name__ == "__main__":
    sys.exit(main())
