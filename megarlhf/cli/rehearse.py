"""A run of any size as far as one process can tell it: `megarlhf rehearse` with the flags of `megarlhf ppo`.

Places every process on nodes such as the options ask for, makes Megatron-Core's groups of all ranks and the parts of
the weights that each hands out, checks them, and writes a line for each process to <save>/rehearsal.jsonl (with
--dry-run it writes nothing). It needs no GPU, no node and no weights: config.json of the models is all it reads.
"""

import sys

from megarlhf.cli.programs import REHEARSE as main

if __name__ == "__main__":
    sys.exit(main())
