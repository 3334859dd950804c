"""Rules against answers that anyone can check."""

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
    ],
)
def test_math(response: str, label: str | None, expected: float | None) -> None:
    assert math_reward(response, label) == expected


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [(" yes\n", "yes", 1.0), ("Yes", "yes", 0.0), ("", " ", 1.0), ("yes", None, None)],
)
def test_exact_match(response: str, label: str | None, expected: float | None) -> None:
    assert exact_match_reward(response, label) == expected


def test_format_wants_the_whole_response_over_line_breaks() -> None:
    pattern = r"<think>.*</think>\s*\d+"
    assert format_reward("<think>a\nb</think>\n42", pattern) == 1.0
    assert format_reward("<think>a\nb</think>\n42 or so", pattern) == 0.0
