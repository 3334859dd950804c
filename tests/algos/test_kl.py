"""KL estimators against exact sums over a small vocabulary, and the controllers against hand-worked steps."""

import math

import pytest
import torch

from megarlhf.algos.kl import MAX_RELATIVE_ERROR, KLController, KLEstimator, kl_estimate
from megarlhf.config.check_numbers import KL_STEP_LIMIT

POLICY_LOGITS = torch.tensor([0.3, -0.2, 1.1, 0.0], dtype=torch.float64)
REF_LOG_PROBS = torch.tensor([-0.1, 0.4, 0.6, -0.5], dtype=torch.float64).log_softmax(0)


def exact_kl(p_log: torch.Tensor, q_log: torch.Tensor) -> torch.Tensor:
    return (p_log.exp() * (p_log - q_log)).sum()


def test_estimates_by_hand() -> None:
    log_probs, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])  # d = -log 2
    assert kl_estimate(log_probs, ref, estimator="k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(log_probs, ref, estimator="k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(log_probs, ref, estimator="k3").item() == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_over_the_policy_is_the_kl(estimator: KLEstimator) -> None:
    log_probs = POLICY_LOGITS.log_softmax(0)
    expected = (log_probs.exp() * kl_estimate(log_probs, REF_LOG_PROBS, estimator=estimator)).sum()
    assert expected.item() == pytest.approx(exact_kl(log_probs, REF_LOG_PROBS).item(), rel=1e-12)


def test_k2_is_near_the_kl_of_close_policies() -> None:
    log_probs = (REF_LOG_PROBS + 1e-3 * POLICY_LOGITS).log_softmax(0)
    expected = (log_probs.exp() * kl_estimate(log_probs, REF_LOG_PROBS, estimator="k2")).sum()
    assert expected.item() == pytest.approx(exact_kl(log_probs, REF_LOG_PROBS).item(), rel=1e-2)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_gradient_as_a_loss_is_what_the_docstring_says(estimator: KLEstimator) -> None:
    logits = POLICY_LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    sampling = log_probs.detach().exp()
    loss = (sampling * kl_estimate(log_probs, REF_LOG_PROBS, estimator=estimator)).sum()
    oracle = POLICY_LOGITS.clone().requires_grad_()
    policy = oracle.log_softmax(0)
    kl = {"k1": policy.sum() * 0, "k2": exact_kl(policy, REF_LOG_PROBS), "k3": exact_kl(REF_LOG_PROBS, policy)}
    expected = torch.autograd.grad(kl[estimator], oracle)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), expected, atol=1e-12, rtol=1e-9)


def test_k3_is_never_negative_and_keeps_small_differences() -> None:
    ref = torch.cat([torch.linspace(-30, 5, 100_001), torch.logspace(-20, 0, 1000), -torch.logspace(-20, 0, 1000)])
    assert kl_estimate(torch.zeros_like(ref), ref, estimator="k3").min() >= 0
    small = kl_estimate(torch.tensor([0.0]), torch.tensor([1e-3]), estimator="k3").item()
    assert small == pytest.approx(math.expm1(1e-3) - 1e-3, rel=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_match_finite_differences(estimator: KLEstimator) -> None:
    log_probs = torch.tensor([-0.5, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.7, -1.0, -3.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, estimator=estimator), (log_probs, ref))


def test_a_coefficient_without_a_target_stays_and_keeps_its_configuration_on_load() -> None:
    controller = KLController(0.02)
    controller.update(kl=100.0, num_samples=1024)
    controller.load_state_dict({"coef": 0.5})
    assert controller.coef == 0.02
    assert controller.state_dict() == {"coef": 0.02}


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1.01),  # error 0.1, gain 1000 / 10000
        (60.0, 1.02),  # error 9, clipped to 0.2
        (0.0, 0.98),  # error -1, clipped to -0.2
        (-3.0, 0.98),  # k1 may be negative
    ],
)
def test_adaptive_controller_by_hand(kl: float, factor: float) -> None:
    controller = KLController(0.05, target=6.0, horizon=10_000)
    controller.update(kl, num_samples=1000)
    assert controller.coef == pytest.approx(0.05 * factor)


def test_adaptive_controller_continues_from_its_state() -> None:
    first = KLController(0.05, target=6.0, horizon=10_000)
    first.update(9.0, 512)
    second = KLController(0.01, target=6.0, horizon=10_000)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(1.0, 512)
    assert first.coef == second.coef != 0.05


def test_controller_refuses_bad_updates_and_states() -> None:
    controller = KLController(0.1, target=6.0, horizon=1000)
    with pytest.raises(ValueError, match="kl=nan"):
        controller.update(math.nan, 10)
    with pytest.raises(ValueError, match="coefficient is 0"):
        controller.load_state_dict({"coef": 0.0})
    with pytest.raises(AssertionError, match="to 0 or below"):
        controller.update(0.0, 5000)
    assert controller.coef == 0.1


def test_what_the_controller_refuses_is_refused_at_set_up() -> None:
    assert KL_STEP_LIMIT == MAX_RELATIVE_ERROR
