"""A run of any size as far as one process can tell it: `megarlhf rehearse` with the flags of `megarlhf ppo`.

Places every process on nodes such as the options ask for, makes Megatron-Core's groups of all ranks and the parts of
the weights that each hands out, checks them, and writes a line for each process to <save>/rehearsal.jsonl (with
--dry-run it writes nothing). It needs no GPU, no node and no weights: config.json of the models is all it reads.
"""

import sys
from collections.abc import Sequence

from megarlhf.cli.checked import run_checked
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.checks import check_ppo


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check and rehearse; returns the exit status."""
    return run_checked("rehearse", PPOConfig, check_ppo, argv)


if __name__ == "__main__":
    sys.exit(main())
