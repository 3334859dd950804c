"""Seeds of responses."""

from itertools import product

from megarlhf.rollout.engine import request_seed


def test_seed_depends_on_every_part_and_on_nothing_else() -> None:
    seeds = [request_seed(*key) for key in product(range(3), repeat=4)]
    assert len(set(seeds)) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60  # the whole range
    assert request_seed(1, 23, 4, 5) != request_seed(12, 3, 4, 5)
    assert request_seed(42, 0, 0, 0) == 3542620368399934404  # runs of other versions stay comparable
