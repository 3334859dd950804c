"""A model measured on held-out prompts: `megarlhf eval` or `python -m megarlhf.cli.evaluate`."""

import sys
from functools import partial

from megarlhf.cli.checked import run_checked
from megarlhf.config.check_loops import check_eval
from megarlhf.config.eval_config import EvalConfig

main = partial(run_checked, "eval", EvalConfig, check_eval)

if __name__ == "__main__":
    sys.exit(main())
