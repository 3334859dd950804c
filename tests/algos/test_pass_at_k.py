"""pass@k against counting every subset of k samples."""

from itertools import combinations, product

import pytest

from megarlhf.algos.pass_at_k import pass_at_k, reported_k


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in range(1, 7) for k in range(1, n + 1)])
def test_it_is_the_share_of_subsets_with_a_correct_sample(n: int, k: int) -> None:
    for correct in product([False, True], repeat=n):
        subsets = list(combinations(correct, k))
        share = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k([sum(correct)], [n], k=k) == pytest.approx(share, abs=1e-15)


def test_the_mean_over_prompts_leaves_those_out_that_have_too_few_samples() -> None:
    # 1 - C(2,2)/C(4,2) = 5/6 and 1 - C(3,2)/C(4,2) = 1/2; the prompt with one sample says nothing of two
    assert pass_at_k([2, 1, 1], [4, 4, 1], k=2) == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert pass_at_k([1, 0], [1, 1], k=2) is None


def test_the_closed_form_at_a_size_where_floats_overflow() -> None:
    # 1 - prod_{i=n-c+1..n} (1 - k / i), the paper's stable form
    n, c, k, fails = 2000, 30, 64, 1.0
    for i in range(n - c + 1, n + 1):
        fails *= 1.0 - k / i
    assert pass_at_k([c], [n], k=k) == pytest.approx(1.0 - fails, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "expected"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])]
)
def test_which_k_are_reported(n: int, expected: list[int]) -> None:
    assert reported_k(n) == expected
