"""Verifiable reward for arithmetic_data.py: 1.0 where the last number of the response equals the label, else 0.0."""

import re
from collections.abc import Sequence

# A minus between two digits is an operator, as in "7-4"; the last number there is 4.
NUMBER = re.compile(r"(?<!\d)-?\d+(?:\.\d+)?")


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> list[float]:
    """Reward of each response.

    Args:
        queries: prompt and response as one text.
        prompts: the prompt alone.
        labels: the answers, such as "-3".
    """
    return [
        float(last_number(query[len(prompt) :]) == float(label))
        for query, prompt, label in zip(queries, prompts, labels, strict=True)
    ]


def last_number(text: str) -> float | None:
    """The last number in a text, without separators between thousands; None where there is none."""
    found = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))
    return float(found[-1]) if found else None
