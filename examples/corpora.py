"""Two small corpora of worked sums, made by reasoning_gym's chain_sum: short ones, and long ones.

    python examples/corpora.py OUT --seed 42

writes OUT/sums.jsonl and OUT/long_sums.jsonl ({"text": document}). The same seed gives the same files.
"""

import argparse
import json
from pathlib import Path

import reasoning_gym

CORPORA = {"sums": (2, 3), "long_sums": (4, 6)}  # name -> fewest and most numbers of a sum


def main() -> None:
    """Write both corpora."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--seed", type=int, default=42, help="seed of the sums")
    parser.add_argument("--num_documents", type=int, default=1000, help="documents of each corpus")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (fewest, most) in CORPORA.items():
        drawn = reasoning_gym.create_dataset(
            "chain_sum", min_terms=fewest, max_terms=most, max_digits=2, size=options.num_documents, seed=options.seed
        )
        lines = [json.dumps({"text": f"{entry['metadata']['expression']} = {entry['answer']}"}) for entry in drawn]
        (options.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
