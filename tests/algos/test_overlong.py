"""DAPO's soft overlong punishment by hand."""

import pytest

from megarlhf.algos.overlong import overlong_penalties


def test_penalty_falls_linearly_over_the_buffer() -> None:
    found = overlong_penalties([1, 12, 13, 14, 16], max_length=16, buffer=4, factor=3.0)
    assert found == pytest.approx([0.0, 0.0, -0.75, -1.5, -3.0])


def test_a_buffer_of_the_whole_length_and_of_one_token() -> None:
    assert overlong_penalties([1, 5, 10], max_length=10, buffer=10, factor=1.0) == pytest.approx([-0.1, -0.5, -1.0])
    assert overlong_penalties([9, 10], max_length=10, buffer=1, factor=0.5) == [0.0, -0.5]
