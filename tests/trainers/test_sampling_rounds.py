"""Dynamic sampling: which groups are trained on, what is drawn in their place, and where the next step goes on."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarlhf.config.arguments import PPOConfig
from megarlhf.data.sampling import PromptSampler
from megarlhf.data.types import Prompt, Rollout, Sample
from megarlhf.trainers.experience import NoSamplesError
from megarlhf.trainers.sampling_rounds import Collected, collect
from megarlhf.trainers.state import LoopState
from tests.trainers.plain_roles import PlainRoles, make_config, make_prompts
from tests.trainers.test_rl import run

COUNT = 17  # prompts


class Uneven(PlainRoles):
    """Prompts with a number in `teaching` have samples of two rewards, the others of one."""

    def __init__(self, teaching: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.teaching, self.rounds = teaching, list[tuple[int, list[int]]]()

    def generate(self, prompts: Sequence[Prompt], *, step: int, first_place: int = 0) -> Rollout:
        self.rounds.append((first_place, [prompt.index for prompt in prompts]))
        return super().generate(prompts, step=step, first_place=first_place)

    def score(self, rollout: Rollout) -> list[Sample]:
        scored = super().score(rollout)
        return [s if s.prompt.index in self.teaching or s.reward is None else replace(s, reward=1.0) for s in scored]


def filtering(tmp_path: Path, *, rounds: int = 5, **options: Any) -> PPOConfig:
    algorithm = {"dynamic_filtering": True, "dynamic_filtering_max_rounds": rounds, **options}
    return make_config(tmp_path, algorithm=algorithm)


def collected(config: PPOConfig, plain: PlainRoles, consumed: int = 0) -> Collected:
    state = LoopState.fresh(config.algorithm)
    state.consumed_prompts, plain.version = consumed, 0
    return collect(config, plain.roles(critic=False), make_prompts(COUNT), state)


def line(config: PPOConfig, number: int) -> list[int]:
    """The endless line of prompts of a run, its first `number`."""
    return PromptSampler(COUNT, number, config.model.seed).batch(0)


def test_equal_rewards_are_replaced_by_the_next_prompts_of_the_line(tmp_path: Path) -> None:
    config = filtering(tmp_path)
    order = line(config, 40)
    plain = Uneven(teaching=[order[i] for i in (1, 9, 12, 13, 15)])  # of the first four one teaches
    found = collected(config, plain, consumed=0)
    assert [indices for _, indices in plain.rounds] == [order[:4], order[4:8], order[8:12], order[12:16]]
    assert [first for first, _ in plain.rounds] == [0, 4, 8, 12], "places go on, so that seeds do"
    assert found.consumed == 16 and len(found.samples) == 32
    assert sorted({s.group_id for s in found.samples}) == list(range(16))
    trained = [place for place, index in enumerate(order[:16]) if index in plain.teaching][:4]
    assert [s.group_id for s in found.rollout.samples] == [place for place in trained for _ in range(2)]
    for place, tokens in enumerate(found.rollout.tokens):
        assert (tokens is not None) == (place in trained), "the others' tokens are let go"
        if tokens is not None:
            assert tokens.prompt_ids.tolist() == make_prompts(COUNT)[order[place]].token_ids.tolist()
    assert trained == [1, 9, 12, 13]
    assert found.metrics == {
        "rollout/filter_rounds": 4.0,
        "rollout/filtered_groups": 11.0,
        "rollout/surplus_groups": 1.0,
    }


def test_later_rounds_draw_what_should_be_enough(tmp_path: Path) -> None:
    """Three of four teach: the missing one takes two prompts more, by 4 / 3; what is beyond the batch is counted."""
    config = filtering(tmp_path)
    order = line(config, 8)
    plain = Uneven(teaching=[*order[:3], *order[4:8]])
    found = collected(config, plain)
    assert [len(indices) for _, indices in plain.rounds] == [4, 2]
    assert {s.group_id for s in found.rollout.samples} == {0, 1, 2, 4}
    assert found.metrics["rollout/surplus_groups"] == 1.0 and found.consumed == 6


def test_a_range_of_means(tmp_path: Path) -> None:
    """Means are 0.5 where rewards differ, else 1."""
    config = filtering(tmp_path, dynamic_filtering_reward_range=(0.6, 1.1))
    order = line(config, 8)
    plain = Uneven(teaching=order[:2])
    found = collected(config, plain)
    assert {s.prompt.index for s in found.rollout.samples}.isdisjoint(order[:2])
    assert found.metrics["rollout/filtered_groups"] == 2.0


def test_without_it_everything_is_trained_on_in_one_round(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    plain = Uneven(teaching=[])
    found = collected(config, plain, consumed=5)
    assert [indices for _, indices in plain.rounds] == [line(config, 9)[5:]]
    assert found.samples == found.rollout.samples and len(found.samples) == 8
    assert found.consumed == 9 and found.metrics == {}


def test_when_rounds_are_used_up_it_goes_on_with_what_there_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = line(filtering(tmp_path), 40)
    algorithm = {"dynamic_filtering": True, "dynamic_filtering_max_rounds": 2}
    plain = Uneven(teaching=order[:2])
    rows = run(tmp_path / "few", plain, batch={"train_iters": 1}, algorithm=algorithm, count=COUNT)
    assert "step 1: dynamic_filtering found 2 of 4 groups in dynamic_filtering_max_rounds=2 rounds of 8" in caplog.text
    assert sum(len(trained) for role, trained, _ in plain.updates if role == "actor") == 4
    assert rows[1]["reward/untrained_steps"] == 0.0 and plain.saved[1]["consumed_prompts"] == 8
    assert rows[1]["reward/mean"] == pytest.approx((2 * 0.5 + 6 * 1.0) / 8), "of all that was generated"
    assert rows[1]["data/epoch"] == pytest.approx(8 / COUNT)
    plain = Uneven(teaching=order[:1])  # 2 of 8 samples: less than min_result_fraction=0.5
    with pytest.raises(NoSamplesError, match="and dynamic_filtering left others out"):
        run(tmp_path / "none", plain, algorithm=algorithm, reward={"max_untrained_steps": 1}, count=COUNT)
    assert plain.updates == []


def test_a_resumed_run_draws_what_the_whole_one_draws(tmp_path: Path) -> None:
    algorithm = {"dynamic_filtering": True}
    options: dict[str, Any] = {"algorithm": algorithm, "batch": {"train_iters": 4}, "logging": {"save_interval": 1}}
    whole = Uneven(teaching=[0, 1, 3, 4, 6, 8, 9, 11, 12, 14, 16])
    rows = run(tmp_path, whole, count=COUNT, **options)
    assert any(state["consumed_prompts"] % 4 for state in whole.saved.values()), "steps draw different numbers"
    rest = Uneven(teaching=whole.teaching)
    found = run(tmp_path, rest, resume=json.loads(json.dumps(whole.saved[2])), count=COUNT, **options)
    assert whole.rounds[-len(rest.rounds) :] == rest.rounds and len(rest.rounds) < len(whole.rounds)
    for step in (3, 4):
        keys = [key for key in rows[step] if key.startswith(("reward/", "rollout/", "data/"))]
        assert {key: found[step][key] for key in keys} == {key: rows[step][key] for key in keys}
    assert rest.saved[4] == whole.saved[4]
