"""Built-in rewards: pure functions of one response and its label, the reference answer. None means no result."""

import re

from math_verify import parse, verify

# Marks of mathematics, with which math-verify finds the expression by itself.
_MATH_MARKS = ("$", "\\boxed", "\\(", "\\[", "\\begin")
# Two letters in a row that are not a LaTeX command: prose, in which math-verify looks for the answer.
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}")


def math_reward(response: str, label: str | None) -> float | None:
    """1.0 where the response's answer equals the label mathematically, else 0.0, as math-verify judges both.

    A text that is nothing but a formula, such as `2\\pi`, is read as LaTeX: as prose math-verify sees only its number,
    2. A comparison that math-verify gives up on after its 5 seconds counts as not equal. It keeps time with signals:
    call this in the main thread only.

    Returns:
        0.0 also for a response without any answer; None for a label that is missing or cannot be parsed.
    """
    gold = [] if label is None else parse(_mark_formula(label), fallback_mode="no_fallback")
    return float(verify(gold, parse(_mark_formula(response)))) if gold else None


def _mark_formula(text: str) -> str:
    is_formula = not any(mark in text for mark in _MATH_MARKS) and _WORD.search(text) is None
    return f"${text}$" if is_formula else text


def exact_match_reward(response: str, label: str | None) -> float | None:
    """1.0 where response and label are equal up to surrounding white space, else 0.0; None without a label."""
    return None if label is None else float(response.strip() == label.strip())


def format_reward(response: str, pattern: str) -> float:
    """1.0 where the whole response matches the regular expression, else 0.0. A dot matches line breaks too."""
    return float(re.fullmatch(pattern, response, flags=re.DOTALL) is not None)
