"""Rules against answers that anyone can check."""

import math
from typing import Any

import pytest

from megarlhf.reward.rules import exact_match_reward, format_reward, math_reward


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        ("so it is \\boxed{\\frac{1}{2}}", "1/2", 1.0),
        ("The answer is 0.5", "\\frac{1}{2}", 1.0),
        ("\\boxed{1/3}", "1/2", 0.0),
        ("no idea", "1/2", 0.0),
        ("", "4", 0.0),
        ("9, no: 10", "the answer is 10", 1.0),
        ("$1 + x^2$", "x^2+1", 1.0),
        ("$2\\pi$", "2\\pi", 1.0),
        ("2", "2\\pi", 0.0),  # read as prose the label would be 2
        ("2\\pi", "2", 0.0),
        ("(1, 2)", "(1,2)", 1.0),
        ("3 + 4 = 7", "7", 1.0),
        ("50%", "50\\%", 1.0),
        ("7", "\\boxed{7}", 1.0),
        ("7", "hello world", None),
        ("7", "\\frac{", None),
        ("7", "", None),
        ("7", None, None),
        # The last box is the answer, whatever stands around it.
        ("\\boxed{1} and \\boxed{2}", "2", 1.0),
        ("\\boxed{1} and \\boxed{2}", "1", 0.0),
        ("\\boxed{1}, \\boxed{2}", "1,2", 0.0),
        ("$\\boxed{1}$, no:\n\\[\\boxed{\\frac{1}{2}}\\]", "0.5", 1.0),
        ("final answer is $5$. I hope it is correct. \\boxed{4}", "4", 1.0),
        ("\\boxed{4}. Check: $2 + 2 = 5$", "4", 1.0),
        ("\\boxed{2} and \\boxed{\\boxed{3}}", "3", 1.0),
        ("\\boxed{3}, that is \\boxed{}", "3", 0.0),
        ("\\boxed{3}, that is \\boxed{4", "3", 1.0),
        ("\\boxed{5} or \\boxed{\\{1, 2\\}}", "\\{2, 1\\}", 1.0),
        ("\\boxed 8", "8", 1.0),
        ("8", "\\boxed{7}, no: $\\boxed{8}$.", 1.0),
        ("\\fbox{3}", "3", 1.0),
        # Labels that are not text.
        ("\\boxed{7}", 7, 1.0),
        ("7", 7.0, 1.0),
        ("\\frac{1}{2}", 0.5, 1.0),
        ("0.0000001", 1e-7, 1.0),
        ("8", [7, "8"], 1.0),
        ("9", [7, "8"], 0.0),
        ("7", ["words", 7], 1.0),
        ("7", True, None),
        ("7", [], None),
        ("7", math.nan, None),
        ("7", {"answer": 7}, None),
    ],
)
def test_math(response: str, label: Any, expected: float | None) -> None:
    assert math_reward(response, label) == expected


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        (" yes\n", "yes", 1.0),
        ("Yes", "yes", 0.0),
        ("", " ", 1.0),
        ("yes", None, None),
        ("7", 7, 1.0),
        ("7.0", 7, 0.0),
        ("7", 7.0, 1.0),
        ("7.0", 7.0, 1.0),
        ("7", 7.5, 0.0),
        ("1000000000000000000000000", 1e24, 1.0),
        ("true", True, 1.0),
        ("True", True, 1.0),
        ("1", True, 0.0),
        ("False", False, 1.0),
        ("b", ["a", " b"], 1.0),
        ("3", ["a", [2, 3]], 1.0),
        ("c", ["a", "b"], 0.0),
        ("None", [None], None),
        ("nan", math.nan, None),
        ("{}", {}, None),
    ],
)
def test_exact_match(response: str, label: Any, expected: float | None) -> None:
    assert exact_match_reward(response, label) == expected


def test_format_wants_the_whole_response_over_line_breaks() -> None:
    pattern = r"<think>.*</think>\s*\d+"
    assert format_reward("<think>a\nb</think>\n42", pattern) == 1.0
    assert format_reward("<think>a\nb</think>\n42 or so", pattern) == 0.0
