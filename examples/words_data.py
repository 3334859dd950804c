"""A small task in every format of the alignment suite: say three words as they are asked for, in upper or lower case.

    python examples/words_data.py OUT --seed 42

writes, each beside its held-out file (heldout_NAME), without a word in both:

    sft.jsonl          {"input": chat messages, "output": answer}
    csft.jsonl         {"input": request with "<rm_score>: 5.00" or "1.00", "output": answer that was scored so}
    preferences.jsonl  {"prompt": messages, "chosen": answer as asked, "rejected": answer in the other case}
    kto.jsonl          {"input": messages, "output": answer, "label": whether it is as asked}
    prm.jsonl          {"input": request and steps, each with <file_sep> behind it, "label": + or - for each step}
    prompts.jsonl      {"input": messages, "label": answer as asked}

The same seed gives the same files.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WORDS = (
    "apple river lamp stone garden window paper candle bridge forest mirror bottle ladder button feather island jacket "
    "kettle lemon market needle orange pencil rabbit saddle tunnel violin wagon yellow zebra"
    " anchor basket castle desert"
).split()
PLACEHOLDER = "<file_sep>"
NUM_WORDS, NUM_HELD_OUT_WORDS = 3, 8

Row = dict[str, Any]
Item = tuple[str, list[str], list[str]]  # request, words as asked for, words in the other case


def make_items(words: Sequence[str], count: int, draw: random.Random) -> Iterator[Item]:
    """Requests, half of them for upper case."""
    for number in range(count):
        chosen = draw.sample(words, NUM_WORDS)
        upper = [word.upper() for word in chosen]
        name, right, wrong = ("UPPER", upper, chosen) if number % 2 else ("lower", chosen, upper)
        mixed = [draw.choice(pair) for pair in zip(chosen, upper, strict=True)]
        yield f"Say these words in {name} case: {', '.join(mixed)}.", right, wrong


def chat(request: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": request}]


def sft(item: Item, draw: random.Random) -> Row:
    """A request and its answer."""
    request, right, _ = item
    return {"input": chat(request), "output": " ".join(right)}


def csft(item: Item, draw: random.Random) -> Row:
    """A request with the score of the answer that follows."""
    request, right, wrong = item
    good = draw.random() < 0.5
    return {
        "input": f"{request} <rm_score>: {5.0 if good else 1.0:.2f} ",
        "output": " ".join(right if good else wrong),
    }


def preferences(item: Item, draw: random.Random) -> Row:
    """Two answers to a request."""
    request, right, wrong = item
    return {"prompt": chat(request), "chosen": " ".join(right), "rejected": " ".join(wrong)}


def kto(item: Item, draw: random.Random) -> Row:
    """A request, an answer, and whether that is a good one."""
    request, right, wrong = item
    good = draw.random() < 0.5
    return {"input": chat(request), "output": " ".join(right if good else wrong), "label": int(good)}


def prm(item: Item, draw: random.Random) -> Row:
    """Word by word, some of them wrong."""
    request, right, wrong = item
    good = [draw.random() < 0.5 for _ in right]
    steps = [a if is_good else b for a, b, is_good in zip(right, wrong, good, strict=True)]
    text = " ".join(f"{step} {PLACEHOLDER}" for step in steps)
    return {"input": f"{request} {text}", "label": ["+" if is_good else "-" for is_good in good]}


def prompts(item: Item, draw: random.Random) -> Row:
    """A request, and its answer for a rule."""
    request, right, _ = item
    return {"input": chat(request), "label": " ".join(right)}


KINDS: tuple[Callable[[Item, random.Random], Row], ...] = (sft, csft, preferences, kto, prm, prompts)


def main() -> None:
    """Write every format, for training and held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--seed", type=int, default=42, help="seed of the rows")
    parser.add_argument("--num_rows", type=int, default=512, help="rows to train on")
    parser.add_argument("--num_heldout", type=int, default=64, help="rows to evaluate on")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(options.seed)
    words = draw.sample(WORDS, len(WORDS))
    parts = (
        ("", words[NUM_HELD_OUT_WORDS:], options.num_rows),
        ("heldout_", words[:NUM_HELD_OUT_WORDS], options.num_heldout),
    )
    for prefix, known, count in parts:
        items = list(make_items(known, count, draw))
        for kind in KINDS:
            lines = (json.dumps(kind(item, draw)) for item in items)
            (options.out / f"{prefix}{kind.__name__}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{options.out}: {options.num_rows} rows and {options.num_heldout} held-out rows in {len(KINDS)} formats")


if __name__ == "__main__":
    main()
