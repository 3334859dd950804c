"""Objectives of preferences against loops over answers in float64, on packed rows of random lengths."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megarlhf.data.packing import fill_fields, pack_rows
from megarlhf.data.types import MicroBatch, TrainingRows, training_rows
from megarlhf.engine.objective import Objective, TokenOutputs
from megarlhf.trainers.dpo import dpo_objective
from megarlhf.trainers.kto import kto_objective, with_margin, with_reference_point
from tests.algos.test_preferences import dpo_pair, kto_row

Sums = dict[str, tuple[float, float]]  # metric -> sum and count


def pairs(number: int = 5) -> TrainingRows:
    """Pairs with equal prompts and answers of one to nine tokens, and reference log-probs."""
    generator = np.random.default_rng(3)
    ids, prompts, fields = [], [], []
    for _ in range(number):
        prompt = generator.integers(3, 90, size=generator.integers(1, 6)).tolist()
        for length in generator.integers(1, 10, size=2).tolist():
            ids.append([*prompt, *generator.integers(3, 90, size=length).tolist()])
            prompts.append(len(prompt))
            fields.append(-generator.exponential(2.0, size=length))
    units = np.repeat(np.arange(number), 2).tolist()
    return training_rows(ids, prompts, unit_ids=units, fields={"ref_log_probs": fields})


def answers(rows: TrainingRows, log_probs: np.ndarray[Any, Any]) -> list[tuple[float, float, int]]:
    """Of each row: log-prob under the policy, under the reference, and number of tokens."""
    cuts = np.cumsum(rows.num_targets)[:-1]
    both = (np.split(values.astype(np.float64), cuts) for values in (log_probs, rows.fields["ref_log_probs"]))
    return [(math.fsum(own), math.fsum(ref), len(own)) for own, ref in zip(*both, strict=True)]


def computed(
    objective: Objective, rows: TrainingRows, log_probs: np.ndarray[Any, Any], parts: list[list[int]], **more: Any
) -> tuple[float, Sums, np.ndarray[Any, Any]]:
    """Sums over the micro-batches that `parts` makes of the rows, and the gradient of each target's log-prob."""
    total, sums = 0.0, dict.fromkeys(objective.metric_names, (0.0, 0.0))
    flat = torch.from_numpy(log_probs.astype(np.float32)).requires_grad_()
    for part in parts:
        batch: MicroBatch = fill_fields(pack_rows(rows, part, **more), rows)
        batch = with_reference_point([batch], 0.8)[0]
        spread = torch.zeros(len(batch.tokens)) + 0 * flat.sum()  # a graph also where there are no rows
        for start, length, position in zip(
            batch.places.starts, batch.places.lengths, batch.places.positions, strict=True
        ):
            spread = spread.index_copy(0, torch.arange(position, position + length), flat[start : start + length])
        loss, metrics = objective.loss(TokenOutputs(log_probs=spread), batch)
        assert set(metrics) == set(sums)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        for name, (value, count) in metrics.items():
            sums[name] = (sums[name][0] + float(value), sums[name][1] + float(count))
    assert flat.grad is not None
    return total, sums, flat.grad.numpy()


WAYS: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "one": ([list(range(10))], {"share_prefix": False}),
    "shared": ([list(range(10))], {"share_prefix": True, "pad_to_multiple": 4}),
    "turned": ([[5, 4, 1, 0], [2, 9, 3, 8], [], [7, 6]], {"share_prefix": False}),
    "alone and shared": ([[2 * pair, 2 * pair + 1] for pair in range(5)], {"share_prefix": True}),
}
DPO = {
    "DPO": {"beta": 0.4, "label_smoothing": 0.0, "ipo": False, "nll_loss_coef": 0.0},
    "cDPO with NLL": {"beta": 0.2, "label_smoothing": 0.1, "ipo": False, "nll_loss_coef": 0.7},
    "IPO": {"beta": 0.3, "label_smoothing": 0.0, "ipo": True, "nll_loss_coef": 0.0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DPO)
def test_dpo_objective_is_its_loop_over_pairs(name: str, way: str) -> None:
    rows, options = pairs(), DPO[name]
    log_probs = -np.random.default_rng(8).exponential(2.0, size=int(rows.num_targets.sum()))
    loss_options = {key: value for key, value in options.items() if key != "nll_loss_coef"}

    def whole(values: np.ndarray[Any, Any]) -> float:
        each = answers(rows, values)
        ratios = [own - ref for own, ref, _ in each]
        losses = [dpo_pair(*two, **loss_options) for two in zip(ratios[0::2], ratios[1::2], strict=True)]
        nll = math.fsum(-own / length for own, _, length in each[0::2])
        return math.fsum(losses) + options["nll_loss_coef"] * nll

    parts, more = WAYS[way]
    loss, sums, gradient = computed(dpo_objective(**options), rows, log_probs, parts, **more)
    assert loss == pytest.approx(whole(log_probs), rel=1e-6)
    unit = np.eye(len(log_probs)) * 1e-5
    slopes = [(whole(log_probs + step) - whole(log_probs - step)) / 2e-5 for step in unit]
    np.testing.assert_allclose(gradient, slopes, rtol=2e-5, atol=1e-6)
    each = answers(rows, log_probs)
    rewards = [options["beta"] * (own - ref) for own, ref, _ in each]
    margins = [first - second for first, second in zip(rewards[0::2], rewards[1::2], strict=True)]
    expected = {
        "accuracy": (sum(margin > 0 for margin in margins), 5),
        "margin": (math.fsum(margins), 5),
        "chosen_reward": (math.fsum(rewards[0::2]), 5),
        "rejected_reward": (math.fsum(rewards[1::2]), 5),
        "chosen_log_prob": (math.fsum(own for own, _, _ in each[0::2]), sum(n for *_, n in each[0::2])),
        "rejected_log_prob": (math.fsum(own for own, _, _ in each[1::2]), sum(n for *_, n in each[1::2])),
    }
    assert 0 < expected["accuracy"][0] < 5
    for metric, pair in expected.items():
        assert sums[metric] == pytest.approx(pair, rel=1e-5), metric


@pytest.mark.parametrize("way", ["one", "turned"])
def test_kto_objective_is_its_loop_over_rows(way: str) -> None:
    labels = [True, False, False, True, True, False, True, True, False, True]
    rows = pairs().with_fields({}, scalars={"desirable": np.float32(labels)})
    log_probs = -np.random.default_rng(8).exponential(2.0, size=int(rows.num_targets.sum()))
    weights = (1.3, 0.7)

    def whole(values: np.ndarray[Any, Any]) -> float:
        each = zip(answers(rows, values), labels, strict=True)
        return math.fsum(kto_row(own - ref, wanted, 0.8, beta=0.3, weights=weights) for (own, ref, _), wanted in each)

    objective = kto_objective(beta=0.3, desirable_loss_weight=weights[0], undesirable_loss_weight=weights[1])
    loss, sums, gradient = computed(objective, rows, log_probs, WAYS[way][0], **WAYS[way][1])
    assert loss == pytest.approx(whole(log_probs), rel=1e-6)
    unit = np.eye(len(log_probs)) * 1e-5
    slopes = [(whole(log_probs + step) - whole(log_probs - step)) / 2e-5 for step in unit]
    np.testing.assert_allclose(gradient, slopes, rtol=2e-5, atol=1e-7)
    ratios = [own - ref for own, ref, _ in answers(rows, log_probs)]
    right = [(ratio > 0.8) == wanted for ratio, wanted in zip(ratios, labels, strict=True)]
    good = math.fsum(0.3 * ratio for ratio, wanted in zip(ratios, labels, strict=True) if wanted)
    bad = math.fsum(0.3 * ratio for ratio, wanted in zip(ratios, labels, strict=True) if not wanted)
    assert 0 < sum(right) < 10
    assert sums["accuracy"] == (sum(right), 10)
    assert sums["desirable_reward"] == pytest.approx((good, 6), rel=1e-5)
    assert sums["undesirable_reward"] == pytest.approx((bad, 4), rel=1e-5)
    assert sums["kl"] == pytest.approx((8.0, 10))
    means = {name: value / count for name, (value, count) in sums.items()}
    assert with_margin(means)["margin"] == pytest.approx(good / 6 - bad / 4, rel=1e-5)
    assert with_margin({"kl": 0.5}) == {"kl": 0.5}


def test_a_pair_that_is_torn_apart_is_no_quiet_loss() -> None:
    rows = replace(pairs(), unit_ids=np.arange(10))
    with pytest.raises(AssertionError, match="chosen first, in pairs"):
        computed(dpo_objective(**DPO["DPO"]), rows, np.zeros(int(rows.num_targets.sum())), [[0, 3]], share_prefix=False)
