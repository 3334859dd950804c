"""`megarlhf convert hf-to-megatron`, without installing the package: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megarlhf.cli.convert import hf_to_megatron

if __name__ == "__main__":
    sys.exit(hf_to_megatron())
