"""`megarlhf convert megatron-to-hf`, without installing the package: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megarlhf.cli.convert import megatron_to_hf

if __name__ == "__main__":
    sys.exit(megatron_to_hf())
