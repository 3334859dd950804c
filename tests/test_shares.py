"""Every slow test belongs to exactly one share."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.shares import share

ROOT = Path(__file__).parents[1]
NODE_IDS = [
    f"tests/{file}.py::test_{n}[a::b-{n}]"
    for file, tests in zip("edcba", (3, 1, 8, 1, 7), strict=True)
    for n in range(tests)
]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_even_and_lose_nothing(count: int) -> None:
    shares = [share(NODE_IDS, number, count) for number in range(count)]
    assert Counter(node_id for each in shares for node_id in each) == Counter(NODE_IDS)
    assert max(map(len, shares)) - min(map(len, shares)) <= 2
    for file in "abcde":
        sizes = [sum(node_id.startswith(f"tests/{file}.py") for node_id in each) for each in shares]
        assert max(sizes) - min(sizes) <= 1, "the tests of one file are dealt out evenly"


def test_shares_come_in_turn_with_the_commits_and_not_with_the_order_of_collection() -> None:
    assert share(NODE_IDS, 1234, 3) == share(NODE_IDS, 1, 3) != share(NODE_IDS, 1235, 3)
    assert share(NODE_IDS[::-1], 1, 3) == share(NODE_IDS, 1, 3)


TESTS = """
import pytest

@pytest.mark.parametrize("n", ["ace", "two", "three", "four", "five"])
@pytest.mark.slow
def test_slow(n): ...

def test_short(): ...
"""


def collected(path: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "tests.shares", "--collect-only", "-q", str(path)]
    quick = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*words, *options], cwd=ROOT, env=quick, capture_output=True, text=True)
    return re.findall(r"::(test_\S+)", done.stdout) or [done.stderr]


def test_the_option_leaves_the_other_tests_alone(tmp_path: Path) -> None:
    (tmp_path / "test_cards.py").write_text(TESTS)
    even = ["test_slow[ace]", "test_slow[two]", "test_slow[four]", "test_short"]  # by name: ace, five, four, three, two
    assert collected(tmp_path, "--slow-share", "6/2") == even
    assert collected(tmp_path, "--slow-share", "7/2") == ["test_slow[three]", "test_slow[five]", "test_short"]
    assert collected(tmp_path, "--slow-share", "7/2", "-k", "three or four") == ["test_slow[three]"]
    assert "--slow-share: 7; it has the form K/N, such as 1/2" in collected(tmp_path, "--slow-share", "7")[0]
