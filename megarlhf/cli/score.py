"""Rewards of the samples of a file: `megarlhf score` or `python -m megarlhf.cli.score`."""

import sys
from functools import partial

from megarlhf.cli.checked import run_checked
from megarlhf.config.check_loops import check_score
from megarlhf.config.loop_arguments import ScoreConfig

main = partial(run_checked, "score", ScoreConfig, check_score)

if __name__ == "__main__":
    sys.exit(main())
