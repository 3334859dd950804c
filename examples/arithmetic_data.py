"""Arithmetic problems as chat prompts for a small instruction-tuned model, made by reasoning_gym's chain_sum.

    python examples/arithmetic_data.py OUT --seed 42

writes OUT/prompts.jsonl and OUT/heldout.jsonl ({"input": chat messages, "label": answer}) for --apply_chat_template.
No expression is in both. The same seed gives the same files.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import reasoning_gym

INSTRUCTION = "Calculate {}. Reply with only the number."
DRAWS_PER_PROBLEM = 50  # problems repeat when there are few different ones

Problem = tuple[str, str]  # expression and answer


def make_problems(*, count: int, max_terms: int, max_digits: int, seed: int) -> list[Problem]:
    """Different sums and differences of non-negative integers, in random order.

    Args:
        count: problems wanted.
        max_terms: numbers in the longest expression; 2 is the shortest.
        max_digits: digits of the largest number.
        seed: of the drawing.
    Raises:
        ValueError: there are not that many different ones.
    """
    drawn = reasoning_gym.create_dataset(
        "chain_sum", max_terms=max_terms, max_digits=max_digits, size=DRAWS_PER_PROBLEM * count, seed=seed
    )
    problems: dict[str, str] = {}
    for entry in drawn:
        problems[entry["metadata"]["expression"]] = entry["answer"]
        if len(problems) == count:
            return list(problems.items())
    raise ValueError(
        f"max_terms={max_terms} and max_digits={max_digits} gave only {len(problems)} different problems of {count}: "
        "ask for fewer, or for more terms or digits"
    )


def write_prompts(path: Path, problems: Iterable[Problem]) -> None:
    """One problem a line."""
    with path.open("w", encoding="utf-8") as file:
        for expression, answer in problems:
            message = {"role": "user", "content": INSTRUCTION.format(expression)}
            file.write(json.dumps({"input": [message], "label": answer}) + "\n")


def main() -> None:
    """Write training and held-out prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--seed", type=int, default=42, help="seed of the problems")
    parser.add_argument("--num_prompts", type=int, default=120, help="problems to train on")
    parser.add_argument("--num_heldout", type=int, default=32, help="problems to evaluate on")
    parser.add_argument("--max_terms", type=int, default=2, help="numbers in an expression")
    parser.add_argument("--max_digits", type=int, default=1, help="digits of a number")
    options = parser.parse_args()
    problems = make_problems(
        count=options.num_heldout + options.num_prompts,
        max_terms=options.max_terms,
        max_digits=options.max_digits,
        seed=options.seed,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_prompts(options.out / "heldout.jsonl", problems[: options.num_heldout])
    write_prompts(options.out / "prompts.jsonl", problems[options.num_heldout :])
    print(f"{options.out}: {options.num_prompts} prompts, {options.num_heldout} held-out prompts")


if __name__ == "__main__":
    main()
