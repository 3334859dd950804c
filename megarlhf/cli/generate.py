"""Responses to prompts, into a file: `megarlhf generate` or `python -m megarlhf.cli.generate`."""

import sys
from functools import partial

from megarlhf.cli.checked import run_checked
from megarlhf.config.check_loops import check_generate
from megarlhf.config.loop_arguments import GenerateConfig

main = partial(run_checked, "generate", GenerateConfig, check_generate)

if __name__ == "__main__":
    sys.exit(main())
