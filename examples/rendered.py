"""Rows whose prompts are messages, with the text that a model's chat template makes of them.

python examples/rendered.py runs/smollm2 runs/words/preferences.jsonl runs/mine/preferences.jsonl
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer


def main(model: str, source: str, target: str) -> None:
    """Write `target`, whose rows are those of `source` but for their prompts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    for row in rows:
        row["prompt"] = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    Path(target).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
