"""Built-in rewards: pure functions of one response and its label, the reference answer. None means no result.

A label is text, or any other JSON value: a number is the text that a person would write (7.0 also as 7), true and false
may begin with a capital, of a list any element is right. null, NaN and objects are no label.
"""

import math
import re
from decimal import Decimal
from typing import Any

from math_verify import parse, verify

# Marks of mathematics, with which math-verify finds the expression by itself.
_MATH_MARKS = ("$", "\\boxed", "\\(", "\\[", "\\begin")
# Two letters in a row that are not a LaTeX command: prose, in which math-verify looks for the answer.
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}")
# A box with braces, or around one word as in `\boxed 7`.
_BOX = re.compile(r"\\f?boxed\s*(\{)|\\f?boxed\s+([^\s{}$]+)")
_BRACE = re.compile(r"\\.|([{}])", re.DOTALL)


def math_reward(response: str, label: Any) -> float | None:
    """1.0 where the response's answer equals the label mathematically, else 0.0, as math-verify judges both.

    The answer is in the last box (`\\boxed{}`), where there is one; what stands around boxes does not count, nor a box
    that is not closed. A text that is nothing but a formula, such as `2\\pi`, is read as LaTeX: as prose math-verify
    sees only its number, 2. A comparison that math-verify gives up on after its 5 seconds counts as not equal. It keeps
    time with signals: call this in the main thread only.

    Returns:
        0.0 also for a response without any answer; None for a label that is missing or cannot be parsed.
    """
    golds = [parse(_answer(text), fallback_mode="no_fallback") for text in label_texts(label)]
    if not any(golds):
        return None
    found = parse(_answer(response))
    return float(any(verify(gold, found) for gold in golds if gold))


def exact_match_reward(response: str, label: Any) -> float | None:
    """1.0 where response and label are equal up to surrounding white space, else 0.0; None without a label."""
    texts = label_texts(label)
    return float(response.strip() in [text.strip() for text in texts]) if texts else None


def format_reward(response: str, pattern: str) -> float:
    """1.0 where the whole response matches the regular expression, else 0.0. A dot matches line breaks too."""
    return float(re.fullmatch(pattern, response, flags=re.DOTALL) is not None)


def label_texts(label: Any) -> list[str]:
    """The texts that a label may be written as; none where it is no label."""
    if isinstance(label, str):
        return [label]
    if isinstance(label, list):
        return [text for element in label for text in label_texts(element)]
    if isinstance(label, bool):
        return [str(label).lower(), str(label)]
    if isinstance(label, int):
        return [str(label)]
    if not isinstance(label, float) or not math.isfinite(label):
        return []
    text = format(Decimal(repr(label)).normalize(), "f")
    return [text, f"{text}.0"] if label.is_integer() else [text]


def _answer(text: str) -> str:
    """What math-verify is to read of a text: the last box alone, or all of it."""
    box = _last_box(text)
    if box is not None:
        return f"\\boxed{{{box}}}"
    is_formula = not any(mark in text for mark in _MATH_MARKS) and _WORD.search(text) is None
    return f"${text}$" if is_formula else text


def _last_box(text: str) -> str | None:
    """What is in the last closed box that is not inside another, None without one."""
    content, start = None, 0
    while (opening := _BOX.search(text, start)) is not None:
        start = opening.end()
        if opening[1] is None:
            content = opening[2]
            continue
        depth = 1
        for brace in _BRACE.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(brace[1], 0)
            if depth == 0:
                content, start = text[opening.end() : brace.start()], brace.end()
                break
    return content
