"""A model and its LoRA adapter made into one checkpoint, without installing the package: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megarlhf.cli.merge_lora import main

if __name__ == "__main__":
    sys.exit(main(prog="merge_lora.py"))
