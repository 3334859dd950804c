"""Does a layout give the one-process result for a model? `megarlhf parity --pretrain DIR --context-parallel-size 2 ...`

Runs the model in one process in float32, then in the layout, on the same random sequences, and prints the largest
differences. Exit status 1 where one is past its tolerance. With --bf16 one process runs in bfloat16 in between: how far
it is off says how far a layout may be.
"""

import sys

from megarlhf.cli.programs import PARITY as main

if __name__ == "__main__":
    sys.exit(main())
