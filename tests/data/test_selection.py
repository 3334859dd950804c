"""Selection of scored samples against cases worked by hand, and a slow loop."""

import math
from typing import Any

import numpy as np
import pytest

from megarlhf.data.selection import (
    conditional_sft,
    extremes,
    group_numbers,
    iterative_dpo,
    rejection_sampling,
    rewards_of,
    with_reward,
)


def sample(place: int | None, output: str, reward: float | None, text: str = "q") -> dict[str, Any]:
    return {"input": text, "output": output, "label": "7", "place": place, "reward": reward}


SAMPLES = [  # in no order; the prompts of 0 and 4 are one text
    sample(4, "a", 0.25),
    sample(0, "b", 1.0),
    sample(4, "c", 0.75),
    sample(9, "d", 0.5, "tied"),
    sample(0, "e", -2.0),
    sample(0, "f", 1.0),
    sample(9, "g", 0.5, "tied"),
    sample(7, "h", None, "no result"),
    sample(4, "i", None),
    sample(8, "j", 3.0, "alone"),
    sample(7, "k", None, "no result"),
]
GROUPS, REWARDS = group_numbers(SAMPLES), rewards_of(SAMPLES)


def test_rejection_sampling_takes_the_first_best_of_each_place() -> None:
    found = rejection_sampling(SAMPLES, GROUPS, REWARDS)
    assert [(row["input"], row["output"], row["reward"]) for row in found.rows] == [
        ("q", "b", 1.0),
        ("q", "c", 0.75),
        ("alone", "j", 3.0),
        ("tied", "d", 0.5),
    ]
    assert found.rows[0]["label"] == "7"
    assert (found.num_ties, found.num_empty) == (0, 1)


def test_iterative_dpo_takes_best_and_worst_and_leaves_ties_out() -> None:
    found = iterative_dpo(SAMPLES, GROUPS, REWARDS)
    assert found.rows == [
        {"prompt": "q", "chosen": "b", "rejected": "e", "chosen_reward": 1.0, "rejected_reward": -2.0},
        {"prompt": "q", "chosen": "c", "rejected": "a", "chosen_reward": 0.75, "rejected_reward": 0.25},
    ]
    assert (found.num_ties, found.num_empty) == (2, 1)  # one reward twice, and a sample alone
    assert str(found) == "2 rows selected; ties left out: 2, without a result: 1"


def test_one_text_with_two_rewards_is_no_pair() -> None:
    samples = [sample(0, "a", 1.0), sample(0, "a", 0.0)]
    found = iterative_dpo(samples, group_numbers(samples), rewards_of(samples))
    assert (found.rows, found.num_ties) == ([], 1)


def test_conditional_sft_writes_every_reward_into_the_prompt() -> None:
    found = conditional_sft(SAMPLES[:3] + SAMPLES[7:8], GROUPS[[0, 1, 2, 7]], REWARDS[[0, 1, 2, 7]])
    assert [row["input"] for row in found.rows] == [f"q <rm_score>: {r} " for r in ("0.25", "1.00", "0.75")]
    assert [row["output"] for row in found.rows] == ["a", "b", "c"]
    assert (found.num_ties, found.num_empty) == (0, 1)
    other = conditional_sft(SAMPLES[:1], GROUPS[:1], REWARDS[:1], template="{reward}: {input} |{reward}|")
    assert other.rows[0]["input"] == "0.25: q |0.25|"


def test_braces_in_a_prompt_are_text() -> None:
    assert with_reward("say {reward} {input}", "5.00") == "say {reward} {input} <rm_score>: 5.00 "


def test_rewards_are_normalized_over_those_that_are_there() -> None:
    values = [0.25, 1.0, 0.75, 0.5, -2.0, 1.0, 0.5, 3.0]
    mean = sum(values) / 8
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / 8)
    found = rewards_of(SAMPLES, normalize=True)
    assert found[~np.isnan(found)] == pytest.approx([(value - mean) / std for value in values])
    assert np.isnan(found).tolist() == [s["reward"] is None for s in SAMPLES]
    equal = [sample(0, "a", 2.0), sample(0, "b", 2.0)]
    assert rewards_of(equal, normalize=True).tolist() == [0.0, 0.0]
    assert np.isnan(rewards_of([sample(0, "a", None)], normalize=True)).all()


def test_an_empty_output_is_no_candidate() -> None:
    samples = [sample(0, "", 3.0), sample(0, "a", 1.0), sample(0, "b", 0.0), sample(1, "", 2.0)]
    rewards = rewards_of(samples, trainable=True, normalize=True)
    assert rewards.tolist() == pytest.approx([math.nan, 1.0, -1.0, math.nan], nan_ok=True)
    found = rejection_sampling(samples, group_numbers(samples), rewards)
    assert [row["output"] for row in found.rows] == ["a"] and found.num_empty == 1
    assert rewards_of(samples).tolist() == [3.0, 1.0, 0.0, 2.0]


def test_files_without_places_are_grouped_by_their_prompts() -> None:
    texts = ["x", "y", "x", "z", "y"]
    assert group_numbers([{"input": text, "output": "o"} for text in texts]).tolist() == [0, 1, 0, 2, 1]
    with pytest.raises(ValueError, match="1 of 2 samples have a place"):
        group_numbers([sample(3, "a", 1.0), sample(None, "a", 1.0)])


def test_nothing_is_chosen_of_nothing() -> None:
    samples = [sample(3, "a", None)]
    for select in (rejection_sampling, iterative_dpo, conditional_sft):
        assert (select(samples, group_numbers(samples), rewards_of(samples)).rows) == []


def test_extremes_equal_a_loop() -> None:
    draw = np.random.default_rng(5)
    groups = draw.integers(0, 40, 300)
    rewards = draw.integers(0, 5, 300).astype(np.float64)  # many equal ones
    rewards[draw.random(300) < 0.3] = np.nan
    best, worst, empty = [], [], 0
    for group in sorted(set(groups.tolist())):
        members = [i for i in range(300) if groups[i] == group and not math.isnan(rewards[i])]
        empty += not members
        if members:
            best.append(max(members, key=lambda i: (rewards[i], -i)))
            worst.append(min(members, key=lambda i: (rewards[i], i)))
    found = extremes(groups, rewards)
    assert (found.best.tolist(), found.worst.tolist(), found.num_empty) == (best, worst, empty)
