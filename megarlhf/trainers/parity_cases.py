"""The objectives that a layout is judged by: each with every term switched on, and rows that have what it asks for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megarlhf.data.planning import prompt_units
from megarlhf.data.types import TrainingRows, training_rows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Objective
from megarlhf.models.build import Head
from megarlhf.trainers.policy import PolicyLossOptions, policy_objective
from megarlhf.trainers.sft import sft_objective
from megarlhf.trainers.value import value_objective

ObjectiveName = Literal["sft", "actor", "critic"]
OBJECTIVES: tuple[ObjectiveName, ...] = ("sft", "actor", "critic")  # sums over tokens, tested in every layout
OF_SEQUENCES: tuple[ObjectiveName, ...] = ()  # and those that compare sequences or models, in layouts that matter


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """An objective and what goes with it.

    Attributes:
        mean_over: what the trainers divide this loss by; "rows" where the rows' own weights add to one each.
        rows: makes its rows of `parity_rows`, whose units are then fixed; None: as they are, cut where they must be.
    """

    objective: Objective
    head: Head = "lm"
    mean_over: Literal["targets", "rows", "units"]
    rows: Callable[[TrainingRows], TrainingRows] | None = None

    def denominator(self, rows: TrainingRows) -> float:
        """What the loss of these rows is divided by."""
        if self.mean_over == "targets":
            return float(rows.num_loss_targets.sum())
        return float(len(rows) if self.mean_over == "rows" else rows.num_units)


def parity_case(name: ObjectiveName) -> ParityCase:
    """By the name of the objective."""
    if name == "sft":
        return ParityCase(objective=sft_objective(), mean_over="targets")
    if name == "critic":
        return ParityCase(objective=value_objective(value_clip=0.2), head="value", mean_over="rows")
    policy = PolicyLossOptions(
        clip_eps_low=0.2,
        clip_eps_high=0.3,
        dual_clip=3.0,
        entropy_coef=0.01,
        kl_loss_coef=0.05,
        kl_estimator="k3",
    )
    return ParityCase(objective=policy_objective(policy), mean_over="rows")


def parity_objective(name: ObjectiveName) -> Objective:
    """A trainer's loss with every term switched on."""
    return parity_case(name).objective


def parity_rows(
    vocab_size: int, *, groups: int = 3, samples: int = 3, longest: int = 12, seed: int = 5
) -> TrainingRows:
    """Groups of samples with equal prompts, ragged responses and every field that a loss may ask for.

    `old_log_probs` and `ref_log_probs` are distances from the model's own, to be added by `anchored`.

    Args:
        longest: no response has more tokens than this, nor a prompt much more.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    ids: list[list[int]] = []
    prompts, units = list[int](), list[int]()
    fields: dict[str, list[Tensor]] = {}
    for group in range(groups):
        prompt = draw(3, vocab_size, 3 + 2 * group * max(1, longest // 12))
        for length in draw(2, longest, samples):
            for name in ("advantages", "old_log_probs", "ref_log_probs", "old_values", "returns"):
                fields.setdefault(name, []).append(torch.randn(length, generator=generator))
            fields.setdefault("weights", []).append(torch.full((length,), 1.0 / length))
            ids.append([*prompt, *draw(3, vocab_size, length)])
            prompts.append(len(prompt))
            units.append(group)
    return training_rows(ids, prompts, unit_ids=units, fields=fields)


def anchored(rows: TrainingRows, log_probs: Tensor) -> TrainingRows:
    """Rows with old and reference log-probs near the model's own, where ratios are moderate and some are clipped.

    Args:
        log_probs: [targets] of the model.
    """
    names = ("old_log_probs", "ref_log_probs")
    return rows.with_fields({name: rows.fields[name] + log_probs.numpy() for name in names})


def fitting(engine: MegatronEngine, rows: TrainingRows, case: ParityCase | None = None) -> TrainingRows:
    """Rows of a case, whose units fit into the engine's micro-batches.

    Groups that share a prompt's computation are cut where they must be; where nothing is shared each row is alone.
    """
    if case is not None and case.rows is not None:
        return case.rows(rows)
    sizes = rows.lengths, rows.prompt_lengths, rows.unit_ids
    return replace(rows, unit_ids=prompt_units(*sizes, num_ranks=engine.ranks.dp_size, packing=engine.packing))
