"""Training data of scored samples: `megarlhf select` or `python -m megarlhf.cli.select`."""

import sys
from functools import partial

from megarlhf.cli.checked import run_checked
from megarlhf.config.check_loops import check_select
from megarlhf.config.loop_arguments import SelectConfig

main = partial(run_checked, "select", SelectConfig, check_select)

if __name__ == "__main__":
    sys.exit(main())
