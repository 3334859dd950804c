"""Every objective against a loop over tokens in plain Python: loss, gradients, metrics, and what must not matter."""

import ast
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import megarlhf.trainers
from megarlhf.algos.kl import KLEstimator
from megarlhf.algos.losses import policy_loss
from megarlhf.data.types import MicroBatch, TargetPlaces
from megarlhf.engine.objective import Objective, TokenOutputs
from megarlhf.engine.schedule import target_log_probs
from megarlhf.parallel.distillation import Direction
from megarlhf.trainers.kd import kd_objective
from megarlhf.trainers.policy import PolicyLossOptions, policy_objective
from megarlhf.trainers.sft import sft_objective
from megarlhf.trainers.value import value_objective

Token = dict[str, float]  # outputs and fields of one position
Scalar = Callable[[Token], tuple[float, dict[str, float], str]]  # -> loss, metrics, the branch that the token takes


@dataclass(frozen=True, kw_only=True)
class Case:
    """An objective, and its loss and metrics for one token, written out without tensors."""

    makes: str  # the function of trainers/ that the objective comes from
    objective: Objective
    token: Scalar
    tokens: list[Token]
    branches: set[str]  # all that `token` knows; each is taken by some token


def policy_token(
    token: Token,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_loss_coef: float,
    kl_estimator: KLEstimator,
    tis_cap: float | None,
    tis_mask_range: tuple[float, float] | None,
) -> tuple[float, dict[str, float], str]:
    """arXiv:1707.06347 equation 7 by cases, dual clip of arXiv:1912.09729, weighed, minus entropy, plus KL."""
    log_prob, advantage = token["log_probs"], token["advantages"]
    ratio = math.exp(log_prob - token.get("old_log_probs", log_prob))
    counted, branch = ratio, "good" if advantage > 0 else "bad"
    if advantage > 0 and ratio > 1 + clip_eps_high:
        counted, branch = 1 + clip_eps_high, "good, likelier than the bound"
    elif advantage > 0 and ratio < 1 - clip_eps_low:
        branch = "good, less likely than the bound"
    elif advantage < 0 and ratio < 1 - clip_eps_low:
        counted, branch = 1 - clip_eps_low, "bad, less likely than the bound"
    elif advantage < 0 and dual_clip is not None and ratio > dual_clip:
        counted, branch = dual_clip, "bad, likelier than the dual bound"
    elif advantage < 0 and ratio > 1 + clip_eps_high:
        branch = "bad, likelier than the bound"
    away = token["ref_log_probs"] - log_prob
    kl = {"k1": -away, "k2": away**2 / 2, "k3": math.exp(away) - 1 - away}[kl_estimator]
    old = token.get("old_log_probs", log_prob)
    sampled = math.exp(old - token["rollout_log_probs"])  # how much likelier for the trainer than for the engine
    weight, corrects = sampled, tis_cap is not None or tis_mask_range is not None
    if tis_mask_range is not None and not tis_mask_range[0] <= sampled <= tis_mask_range[1]:
        weight = 0.0
    elif tis_mask_range is None:
        weight = min(sampled, tis_cap) if tis_cap is not None else 1.0
    loss = -counted * advantage * weight - entropy_coef * token["entropy"] + kl_loss_coef * kl
    metrics = {
        "clip_frac": float(counted != ratio),
        "entropy": token["entropy"],
        "approx_kl": ratio - 1 - math.log(ratio),
        "ratio_mean": ratio,
        "kl": kl if kl_loss_coef else 0.0,
    }
    if corrects:
        metrics |= {"tis_mean": sampled, "tis_clip_frac": float(weight != sampled)}
    return token["weights"] * loss, metrics, branch


def value_token(token: Token, *, value_clip: float) -> tuple[float, dict[str, float], str]:
    """The larger of two squares by cases: only a value that left its old one towards the return may be held back."""
    value, old, target = token["values"], token["old_values"], token["returns"]
    error, branch = value - target, "near the old value"
    for sign, name in ((1, "above"), (-1, "below")):
        if sign * (value - old) > value_clip:
            held = old + sign * value_clip - target
            branch = f"held {name}" if abs(held) > abs(error) else f"{name}, own error larger"
            error = max(error, held, key=abs)
    metrics = {"clip_frac": float(branch.startswith("held")), "value_mean": value}
    return token["weights"] * error**2 / 2, metrics, branch


def sft_token(token: Token) -> tuple[float, dict[str, float], str]:
    """Cross-entropy."""
    return -token["log_probs"], {}, "only"


def kd_token(token: Token, *, kd_coef: float, direction: str) -> tuple[float, dict[str, float], str]:
    """A share of either cross-entropy; reverse, of the divergence alone."""
    distilled = token["divergence"] + (token["teacher_entropy"] if direction == "forward" else 0.0)
    loss = (1 - kd_coef) * -token["log_probs"] + kd_coef * distilled
    metrics = {"lm_loss": -token["log_probs"], "kl": token["divergence"], "teacher_entropy": token["teacher_entropy"]}
    return loss, metrics, direction


def policy_tokens(*, with_old: bool) -> list[Token]:
    """Ratios on both sides of every bound below, for good and bad tokens; no two numbers alike."""
    tokens = []
    ratios = (0.31, 0.62, 0.97, 1.18, 1.44, 1.71, 2.2, 2.9, 4.7)
    for place, (sign, ratio) in enumerate((sign, ratio) for sign in (1, -1) for ratio in ratios):
        old = -0.4 - 0.13 * place
        token = {
            "log_probs": old + math.log(ratio),
            "entropy": 0.5 + 0.07 * place,
            "advantages": sign * (0.35 + 0.11 * place),
            "ref_log_probs": old + 0.9 * math.sin(place),
            "rollout_log_probs": old + 1.1 * math.cos(2 * place),
            "weights": 0.2 + 0.05 * place,
        }
        tokens.append(token | {"old_log_probs": old} if with_old else token)
    return tokens


VALUE_TOKENS: list[Token] = [
    {"values": value, "old_values": old, "returns": target, "weights": 0.3 + 0.1 * place}
    for place, (value, old, target) in enumerate(
        [(0.5, 0.4, 1.5), (0.5, 0.6, -1.1), (1.1, 0.2, 1.4), (1.3, 0.2, -0.8), (-1.2, 0.1, -1.9), (-0.9, 0.3, 0.7)]
    )
]
POLICY = PolicyLossOptions(
    clip_eps_low=0.25, clip_eps_high=0.55, dual_clip=2.4, entropy_coef=0.07, kl_loss_coef=0.3, kl_estimator="k3"
)
SIDES = {
    f"{sort}{side}"
    for sort in ("good", "bad")
    for side in ("", ", likelier than the bound", ", less likely than the bound")
}
DUAL = {"bad, likelier than the dual bound"}


def policy_case(options: PolicyLossOptions, branches: set[str], *, with_old: bool = True) -> Case:
    return Case(
        makes="policy_objective",
        objective=policy_objective(options),
        token=lambda token: policy_token(token, **asdict(options)),
        tokens=policy_tokens(with_old=with_old),
        branches=branches,
    )


DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
CASES = {
    "policy": policy_case(POLICY, SIDES | DUAL),
    "policy with k1": policy_case(replace(POLICY, kl_estimator="k1"), SIDES | DUAL),
    "policy with k2": policy_case(replace(POLICY, kl_estimator="k2"), SIDES | DUAL),
    "policy without dual clip": policy_case(replace(POLICY, dual_clip=None), SIDES),
    "policy, dual bound inside the clip": policy_case(
        replace(POLICY, dual_clip=1.3), SIDES - {"bad, likelier than the bound"} | DUAL
    ),
    "policy without entropy and KL": policy_case(replace(POLICY, entropy_coef=0.0, kl_loss_coef=0.0), SIDES | DUAL),
    "policy that trains once": policy_case(POLICY, {"good", "bad"}, with_old=False),
    "policy with truncated weights": policy_case(replace(POLICY, tis_cap=1.8), SIDES | DUAL),
    "policy with masked weights": policy_case(replace(POLICY, tis_mask_range=(0.5, 2.0)), SIDES | DUAL),
    "policy that trains once, with weights": policy_case(replace(POLICY, tis_cap=1.8), {"good", "bad"}, with_old=False),
    "value": Case(
        makes="value_objective",
        objective=value_objective(value_clip=0.45),
        token=lambda token: value_token(token, value_clip=0.45),
        tokens=VALUE_TOKENS,
        branches={
            "near the old value",
            "held above",
            "held below",
            "above, own error larger",
            "below, own error larger",
        },
    ),
    "sft": Case(
        makes="sft_objective",
        objective=sft_objective(),
        token=sft_token,
        tokens=[{"log_probs": -0.3 * place, "weights": 7.0 + place} for place in range(1, 6)],
        branches={"only"},
    ),
    **{
        f"kd, {direction}": Case(
            makes="kd_objective",
            objective=kd_objective(target_log_probs, kd_coef=0.3, direction=direction),
            token=partial(kd_token, kd_coef=0.3, direction=direction),
            tokens=[
                {
                    "log_probs": -0.4 * place,
                    "divergence": 0.2 * place + 0.1,
                    "teacher_entropy": 1.3 + place,
                    "weights": 9.0,
                }
                for place in range(1, 6)
            ],
            branches={direction},
        )
        for direction in DIRECTIONS
    },
}
OUTPUTS = ("log_probs", "entropy", "values", "divergence", "teacher_entropy")
# Losses that are no sum over tokens of a number each, and the file with their loops: tests/trainers/test_NAME.py.
ELSEWHERE = {
    "dpo_objective": "preferences",
    "kto_objective": "preferences",
    "process_reward_objective": "process_reward_model",
    "reward_objective": "reward_model",
}


def micro_batch(tokens: list[Token], garbage: float) -> tuple[dict[str, Tensor], MicroBatch]:
    """The tokens in one line in float64, with `garbage` in every number between them; the outputs ask for gradients."""
    length = 3 * len(tokens) + 2
    mask = torch.zeros(length, dtype=torch.bool)
    places = [3 * place + 1 + place % 2 for place in range(len(tokens))]
    mask[places] = True
    line = {name: torch.full((length,), garbage, dtype=torch.float64) for name in tokens[0]}
    for place, token in zip(places, tokens, strict=True):
        for name, value in token.items():
            line[name][place] = value
    outputs = {name: line.pop(name).requires_grad_() for name in OUTPUTS if name in line}
    whole, none = torch.zeros(length, dtype=torch.int64), np.empty(0, dtype=np.int64)
    batch = MicroBatch(
        tokens=whole,
        targets=whole,
        position_ids=whole,
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        prefix_segments=(None,),
        target_mask=mask,
        fields=line,
        row_ids=torch.where(mask, 0, -1),
        places=TargetPlaces(rows=none, positions=none, starts=none, lengths=none),
    )
    return outputs, batch


def slope(case: Case, token: Token, name: str) -> float:
    """Central difference of the scalar loss; where the ratio is to the token itself, that stays where it is."""
    step = 1e-6
    fixed = (
        token
        if "old_log_probs" in token or "advantages" not in token
        else token | {"old_log_probs": token["log_probs"]}
    )
    above, below = (case.token(fixed | {name: token[name] + sign * step})[0] for sign in (1, -1))
    return (above - below) / (2 * step)


@pytest.mark.parametrize("garbage", [0.0, math.nan, 1e30])
@pytest.mark.parametrize("name", CASES)
def test_objective_is_its_scalar_loop(name: str, garbage: float) -> None:
    case = CASES[name]
    expected = [case.token(token) for token in case.tokens]
    assert {branch for _, _, branch in expected} == case.branches, "the tokens are placed to take every branch"
    outputs, batch = micro_batch(case.tokens, garbage)
    loss, metrics = case.objective.loss(TokenOutputs(**outputs), batch)
    assert loss.item() == pytest.approx(math.fsum(value for value, _, _ in expected), rel=1e-12)
    assert set(metrics) == set(case.objective.metric_names)
    for metric, (value, count) in metrics.items():
        assert not value.requires_grad and count == len(case.tokens)
        whole = math.fsum(metrics_of[metric] for _, metrics_of, _ in expected)
        assert value.item() == pytest.approx(whole, rel=1e-6, abs=1e-9), metric
    loss.backward()  # type: ignore[no-untyped-call]
    for output, tensor in outputs.items():
        gradient = torch.zeros(()).expand_as(tensor) if tensor.grad is None else tensor.grad
        assert not gradient[~batch.target_mask].any(), "positions outside the targets have no gradient"
        wanted = [slope(case, token, output) for token in case.tokens]
        assert gradient[batch.target_mask].tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-8), output


def test_every_objective_has_a_case() -> None:
    """An objective is made where `Objective(...)` is called."""
    makers = set()
    for path in Path(megarlhf.trainers.__path__[0]).glob("**/*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                called = {node.func for node in ast.walk(function) if isinstance(node, ast.Call)}
                if any(isinstance(name, ast.Name) and name.id == "Objective" for name in called):
                    makers.add(function.name)
    assert makers == {case.makes for case in CASES.values()} | ELSEWHERE.keys(), "add its loop to CASES"
    assert all(Path(__file__).with_name(f"test_{name}.py").is_file() for name in ELSEWHERE.values())


def test_a_ratio_that_overflows_is_infinite_in_the_metric_alone() -> None:
    """Good, neutral and bad token of ratio exp(200): cut off, so the loss is finite and the gradient 0."""
    objective = policy_objective(replace(POLICY, kl_loss_coef=0.0, entropy_coef=0.0))
    tokens = [
        {"log_probs": -1.0, "entropy": 0.5, "advantages": a, "old_log_probs": -201.0, "weights": 1.0}
        for a in (2.0, 0.0, -2.0)
    ]
    outputs, batch = micro_batch(tokens, 0.0)
    outputs = {name: tensor.detach().float().requires_grad_() for name, tensor in outputs.items()}
    fields = {name: tensor.float() for name, tensor in batch.fields.items()}
    loss, metrics = objective.loss(TokenOutputs(**outputs), replace(batch, fields=fields))
    assert loss.item() == pytest.approx(-1.55 * 2.0 + 2.4 * 2.0)
    assert metrics["ratio_mean"][0].item() == math.inf and metrics["approx_kl"][0].item() == math.inf
    assert metrics["clip_frac"] == (2.0, 3)
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = outputs["log_probs"].grad
    assert gradient is not None and not gradient.any()


def test_a_ratio_that_overflows_where_nothing_is_cut_off_is_no_quiet_step() -> None:
    """A bad token of ratio exp(200) without a dual bound: the norm of its gradient is infinite in float32."""
    log_probs, old, bad = torch.tensor([-1.0], requires_grad=True), torch.tensor([-201.0]), torch.tensor([-2.0])
    loss, clipped = policy_loss(log_probs, old, bad, clip_eps_low=0.25, clip_eps_high=0.55, dual_clip=None)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert not clipped and gradient.square().sum().item() == math.inf
