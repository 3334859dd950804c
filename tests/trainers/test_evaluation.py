"""What an evaluation reports of its sets, and which step's was the best."""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any
from weakref import ref

import pytest

from megarlhf.algos.pass_at_k import pass_at_k
from megarlhf.config.arguments import LoggingArguments, PPOConfig
from megarlhf.config.evaluation_arguments import EvaluationArguments
from megarlhf.data.prompts import PromptData
from megarlhf.data.types import Prompt, Rollout, Sample
from megarlhf.metrics.keys import check_metrics
from megarlhf.metrics.sinks import Sinks
from megarlhf.trainers import rl
from megarlhf.trainers.best import Best
from megarlhf.trainers.evaluation import EvaluationSets, evaluate, metric_names
from megarlhf.trainers.state import LoopState
from tests.trainers.plain_roles import PlainRoles, judged, make_config, make_prompts


class Judged(PlainRoles):
    """Rewards by (prompt's text, sample); None has no result. Greedy responses are sample 0 of one."""

    def __init__(self, greedy: dict[str, float | None], sampled: dict[str, list[float | None]]) -> None:
        super().__init__()
        self._greedy, self._sampled = greedy, sampled

    def score(self, rollout: Rollout) -> list[Sample]:
        assert self.phase == "judge"
        alone = len(rollout.samples) == len(rollout.tokens)
        return [
            judged(s, self._greedy[s.prompt.text] if alone else self._sampled[s.prompt.text][s.sample_id])
            for s in rollout.samples
        ]


def prompts(*texts: str) -> list[Prompt]:
    made = make_prompts(len(texts))
    return [replace(prompt, text=text) for prompt, text in zip(made, texts, strict=True)]


def configured(
    *, reward: dict[str, Any] | None = None, batch: dict[str, Any] | None = None, **options: Any
) -> PPOConfig:
    given = {"reward_function": "f.py"} if reward is None else reward
    return replace(make_config(Path("s"), reward=given, batch=batch), evaluation=EvaluationArguments(**options))


def evaluated(plain: PlainRoles, sets: EvaluationSets, **options: Any) -> dict[str, float]:
    roles = plain.roles(critic=False)
    found = evaluate(roles.phases, roles.rollout, roles.reward, sets, configured(**options))
    check_metrics(found)
    return found


def test_sets_are_reported_apart_and_together() -> None:
    greedy = {"a": 1.0, "b": 0.5, "c": None, "d": 2.0, "e": 0.0}
    sampled = {"a": [1.0, 0.0, 0.0], "b": [0.0, 0.0, 0.0], "c": [1.0, None, 1.0], "d": [1, 1, 1], "e": [0, 1, None]}
    plain = Judged(greedy, sampled)
    found = evaluated(
        plain,
        {"math": prompts("a", "b", "c"), "code": prompts("d", "e")},
        **{"eval_n_samples_per_prompt": 3, "eval_temperature": 0.7, "batch": {"rollout_batch_size": 10}},
    )
    assert plain.events == ["evaluate", "evaluate 3 at 0.7"], "each once, whatever the number of sets"
    assert found["eval/math/accuracy"] == 0.5 and found["eval/code/accuracy"] == 0.5
    assert found["eval/math/reward_mean"] == 0.75 and found["eval/code/reward_mean"] == 1.0
    assert found["eval/math/no_result_count"] == 2.0 and found["eval/code/no_result_count"] == 1.0
    assert found["eval/math/pass@1"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert found["eval/math/pass@2"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found["eval/math/pass@3"] == pytest.approx((1 + 0) / 2), "c has two results alone"
    assert found["eval/code/pass@2"] == pytest.approx(pass_at_k([3, 1], [3, 2], k=2)) == 1.0
    for key in ("accuracy", "reward_mean", "pass@1", "pass@2", "pass@3", "response_length_mean"):
        assert found[f"eval/{key}"] == pytest.approx((found[f"eval/math/{key}"] + found[f"eval/code/{key}"]) / 2)
    assert found["eval/no_result_count"] == 3.0
    names = metric_names(["math", "code"], configured(eval_n_samples_per_prompt=3))
    assert set(found) == set(names)


@pytest.mark.parametrize(("prompts_of_a_step", "parts"), [(1, [1] * 5), (3, [1] * 5), (4, [2, 2, 1]), (6, [3, 2])])
def test_no_more_is_answered_at_a_time_than_a_step_holds(prompts_of_a_step: int, parts: list[int]) -> None:
    """Of 2 responses to each prompt in a step, and 1 + 3 in the evaluation; the numbers are those of one part."""
    greedy = {"a": 1.0, "b": 0.5, "c": None, "d": 2.0, "e": 0.0}
    sampled = {"a": [1.0, 0.0, 0.0], "b": [0.0, 0.0, 1.0], "c": [1.0, 3.0, 1.0], "d": [1, 1, 0], "e": [0, 1, None]}
    sets = {"math": prompts("a", "b", "c"), "code": prompts("d", "e")}
    given = {"eval_n_samples_per_prompt": 3, "eval_temperature": 0.7}

    class Counting(Judged):
        def answer(self, prompts: Sequence[Prompt], *, n_samples: int, temperature: float | None) -> Rollout:
            asked.append(len(prompts))
            if temperature == 0:
                assert not [one for one in held if one() is not None], "tokens of the part before are in the store"
            found = super().answer(prompts, n_samples=n_samples, temperature=temperature)
            held.extend(map(ref, found.tokens))
            same = [replace(s, response_length=2 + s.prompt.index) for s in found.samples]
            return replace(found, samples=same)

    asked, held = list[int](), list[Any]()
    whole = evaluated(Counting(greedy, sampled), sets, **given, batch={"rollout_batch_size": 10})
    assert asked == [5, 5]
    asked.clear()
    found = evaluated(Counting(greedy, sampled), sets, **given, batch={"rollout_batch_size": prompts_of_a_step})
    assert asked == [size for size in parts for _ in range(2)] and found == whole


def test_too_few_results_are_no_value(caplog: pytest.LogCaptureFixture) -> None:
    """Nor is the mean over the sets one over those that have it."""
    lost: dict[str, float | None] = {"a": 1.0, "b": None, "c": None, "d": 1.0, "e": 0.0}
    sets = {"math": prompts("a", "b", "c"), "code": prompts("d", "e")}
    found = evaluated(Judged(lost, {}), sets)
    assert found["eval/code/accuracy"] == 0.5 and found["eval/math/no_result_count"] == 2.0
    left_out = [f"eval/{name}{key}" for name in ("math/", "") for key in ("accuracy", "reward_mean")]
    assert not set(left_out) & set(found) and Best().after(1, found, logged()) == Best()
    (line,) = caplog.messages
    assert line.startswith("2 of 5 responses have no result: there is no eval/accuracy, eval/reward_mean, eval/math/")
    assert "min_result_fraction=0.5, max_no_result_fraction=None" in line
    caplog.clear()
    enough = {"reward_function": "f.py", "min_result_fraction": 0.3}
    found = evaluated(Judged(lost, {}), sets, reward=enough)
    assert found["eval/accuracy"] == 0.75 and not caplog.messages
    found = evaluated(Judged(lost, {}), sets, reward=enough | {"max_no_result_fraction": 0.6})
    assert "eval/accuracy" not in found
    few = {"a": [1.0, None], "b": [None, None]}
    found = evaluated(Judged({"a": 1.0, "b": 1.0}, few), {"": prompts("a", "b")}, eval_n_samples_per_prompt=2)
    assert found["eval/accuracy"] == 1.0 and not {"eval/pass@1", "eval/pass@2"} & set(found)


def test_one_set_without_a_name_is_reported_without_one() -> None:
    found = evaluated(Judged({"a": 1.0, "b": 0.0, "c": 1.0}, {}), {"": prompts("a", "b", "c")})
    assert found["eval/accuracy"] == pytest.approx(2 / 3)
    assert set(found) == set(metric_names([""], configured()))
    found = evaluated(Judged({"a": 1.0}, {}), {"math": prompts("a")})
    assert found["eval/accuracy"] == found["eval/math/accuracy"] == 1.0


def test_reward_models_and_servers_do_not_say_what_is_right() -> None:
    """Their scale is their own: where a rule or a function scores too that decides, and else nothing does."""

    class Parts(Judged):
        def score(self, rollout: Rollout) -> list[Sample]:
            parts = {"a": {"rule": 1.0}, "b": {"rule": 0.0}, "c": {"rule": None}, "d": {"function": 0.5, "rule": 0.5}}
            found = super().score(rollout)
            others: dict[str, float | None] = {"reward_model_0": 3.0, "remote": 5.0, "function/logged": 7.0}
            return [replace(s, parts=others | parts.get(s.prompt.text, {})) for s in found]

    plain = Parts({"a": -4.0, "b": 7.0, "c": None, "d": 0.0, "e": 9.0}, {})
    found = evaluated(plain, {"": prompts("a", "b", "c", "d", "e")})
    assert found["eval/accuracy"] == 2 / 3 and found["eval/reward_mean"] == pytest.approx(3.0)
    alone = evaluated(plain, {"": prompts("e")})
    assert "eval/accuracy" not in alone and alone["eval/reward_mean"] == 9.0
    served = configured(reward={"remote_rm_url": ("http://127.0.0.1:5000/get_reward",)}, eval_n_samples_per_prompt=2)
    assert metric_names(["m"], served)[:3] == ["eval/reward_mean", "eval/response_length_mean", "eval/no_result_count"]
    assert not [name for name in metric_names(["m"], served) if "accuracy" in name or "pass" in name]
    code = configured(reward={"remote_rm_url": ("reward.py",)}, eval_n_samples_per_prompt=2)
    assert "eval/m/accuracy" in metric_names(["m"], code) and "eval/pass@2" in metric_names(["m"], code)


def test_what_has_no_result_is_not_wrong() -> None:
    found = evaluated(Judged({"a": None}, {"a": [None, None]}), {"": prompts("a")}, eval_n_samples_per_prompt=2)
    assert set(found) == {"eval/response_length_mean", "eval/no_result_count"} and found["eval/no_result_count"] == 3
    assert evaluated(PlainRoles(), {}) == {}


def logged(save: str = "s", **options: Any) -> LoggingArguments:
    return LoggingArguments(save=save, **({"best_metric": "eval/accuracy"} | options))


@pytest.mark.parametrize(("mode", "expected"), [("max", [None, 2, 3, 3, 3, 3]), ("min", [None, 2, 2, 4, 4, 4])])
def test_the_first_of_the_best_stays(mode: Any, expected: list[int]) -> None:
    best, found = Best(), []
    for step, value in enumerate((nan, 0.5, 0.75, 0.25, nan, 0.75 if mode == "max" else 0.25), start=1):
        best = best.after(step, {"eval/accuracy": value}, logged(best_metric_mode=mode))
        found.append(best.step)
    assert found == expected
    assert best.after(9, {"eval/other": 7.0}, logged(best_metric_mode=mode)) == best
    assert best.after(9, {"eval/accuracy": 7.0, "other": -9.0}, logged(best_metric=None)) == best


def test_another_metric_starts_anew() -> None:
    best = Best(metric="eval/accuracy", step=3, value=0.9)
    assert best.after(4, {"eval/reward_mean": 0.1}, logged(best_metric="eval/reward_mean")).step == 4
    assert Best.of_state({}) == Best()


class Learning(PlainRoles):
    """Greedy answers are right with the weights of some steps."""

    accuracies: Sequence[float] = (0.9, 0.25, 0.75, 0.5, 0.75, 0.5)  # of weights 0, 1, ...

    def score(self, rollout: Rollout) -> list[Sample]:
        scored = super().score(rollout)
        if len(rollout.samples) != len(rollout.tokens):
            return scored
        right = round(self.accuracies[self.version] * len(scored))
        return [judged(s, float(i < right)) for i, s in enumerate(scored)]


def train(save: Path, plain: PlainRoles, *, resume: dict[str, Any] | None = None, **logging: Any) -> list[Any]:
    config = make_config(save, batch={"train_iters": 5}, logging={"eval_interval": 1} | logging)
    state = LoopState.fresh(config.algorithm)
    if resume is not None:
        state.restore(json.loads(json.dumps(resume)))
    sinks = Sinks(save, total_steps=5, resumed_step=state.step or None)
    prompts = PromptData(prompts=make_prompts(10), num_dropped=0)
    rl.train(config, plain.roles(critic=True), prompts, {"": make_prompts(4)}, state, sinks, lambda: False)
    sinks.close()
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_the_best_step_is_saved_whatever_the_interval_and_a_resumed_run_remembers_it(tmp_path: Path) -> None:
    whole = Learning()
    train(tmp_path / "whole", whole, best_metric="eval/accuracy")
    assert list(whole.saved) == [1, 2, 5], "better than before, better again, and the last; not the start at 0.9"
    assert whole.saved[5]["best"] == {"metric": "eval/accuracy", "step": 2, "value": 0.75}
    rest = Learning()
    train(tmp_path / "rest", rest, resume=whole.saved[2], best_metric="eval/accuracy")
    assert list(rest.saved) == [5] and rest.saved[5] == whole.saved[5]
    without = Learning()
    train(tmp_path / "without", without)
    assert list(without.saved) == [5]


def test_without_an_interval_epochs_end_with_an_evaluation(tmp_path: Path) -> None:
    rows = train(tmp_path, PlainRoles(), eval_interval=None)  # 4 prompts a step of 10: passes end in steps 3 and 5
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 3, 5]


def test_a_steps_tokens_are_gone_when_an_evaluation_begins(tmp_path: Path) -> None:
    class Holding(PlainRoles):
        tokens: Sequence[Any] = ()

        def generate(self, prompts: Sequence[Prompt], *, step: int, first_place: int = 0) -> Rollout:
            found = super().generate(prompts, step=step, first_place=first_place)
            self.tokens = list(map(ref, found.tokens))
            return found

        def answer(self, prompts: Sequence[Prompt], *, n_samples: int, temperature: float | None) -> Rollout:
            assert not [one for one in self.tokens if one() is not None]
            return super().answer(prompts, n_samples=n_samples, temperature=temperature)

    plain = Holding()
    train(tmp_path, plain)
    assert plain.tokens
