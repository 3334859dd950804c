"""The demo's verifiable reward: are the digits sorted?

1.0 for exactly the label; otherwise half of the fraction of places that hold the right character, so that a nearly
right answer is told from a wrong one. The reported accuracy does not see partial credit: `eval/accuracy` counts
rewards of 1.0.
"""

from collections.abc import Sequence

PARTIAL_CREDIT = 0.5


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> list[float]:
    """Reward of each response.

    Args:
        queries: prompt and response as one text.
        prompts: the prompt alone.
        labels: the digits in order, such as "147".
    """
    return [score(query[len(prompt) :], label) for query, prompt, label in zip(queries, prompts, labels, strict=True)]


def score(response: str, label: str) -> float:
    """1.0 where the response is the label, else PARTIAL_CREDIT times the fraction of places that agree."""
    if response == label:
        return 1.0
    # zip stops at the shorter text; the places beyond it do not agree
    agreeing = sum(a == b for a, b in zip(response, label, strict=False))
    return PARTIAL_CREDIT * agreeing / max(len(response), len(label))
