"""The objectives that a layout is judged by: each with every term switched on, and rows that have what it asks for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megarlhf.config.supervised_arguments import ObjectiveName
from megarlhf.data.planning import prompt_units
from megarlhf.data.types import TrainingRows, training_rows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Objective, OutputLayer
from megarlhf.models.build import Head
from megarlhf.parallel.vocab import OutputDistribution
from megarlhf.trainers.dpo import dpo_objective
from megarlhf.trainers.kd import HIDDEN, kd_objective, teacher_outputs
from megarlhf.trainers.kto import kto_objective
from megarlhf.trainers.policy import PolicyLossOptions, policy_objective
from megarlhf.trainers.process_reward_model import process_reward_objective
from megarlhf.trainers.reward_model import reward_objective
from megarlhf.trainers.sft import sft_objective
from megarlhf.trainers.value import value_objective

OBJECTIVES: tuple[ObjectiveName, ...] = ("sft", "actor", "critic")  # sums over tokens, tested in every layout
# And of sequences or models, tested in layouts that matter.
OF_SEQUENCES: tuple[ObjectiveName, ...] = ("rm", "prm", "dpo", "ipo", "kto", "kd")

_REWARD_TOKENS = (7, 71, 3)  # on both ranks of the vocabulary of the tests, split in two


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
        return ParityCase(objective=sft_objective(), mean_over="targets", rows=_chats)
    if name == "critic":
        return ParityCase(objective=value_objective(value_clip=0.2), head="value", mean_over="rows")
    if name == "prm":
        return ParityCase(objective=process_reward_objective(_REWARD_TOKENS), mean_over="targets", rows=_with_labels)
    if name == "dpo":
        objective = dpo_objective(beta=0.2, label_smoothing=0.1, ipo=False, nll_loss_coef=0.3)
        return ParityCase(objective=objective, mean_over="units", rows=_pairs)
    if name == "ipo":
        objective = dpo_objective(beta=0.2, label_smoothing=0.0, ipo=True, nll_loss_coef=0.3)
        return ParityCase(objective=objective, mean_over="units", rows=_pairs)
    if name == "kto":
        objective = kto_objective(beta=0.3, desirable_loss_weight=1.3, undesirable_loss_weight=0.8)
        return ParityCase(objective=objective, mean_over="units", rows=_labelled)
    if name == "kd":
        outputs = teacher_outputs(_drawn_teacher, "forward")
        objective = kd_objective(outputs, kd_coef=0.6, direction="forward")
        return ParityCase(objective=objective, mean_over="targets", rows=_distilled_rows)
    if name == "rm":
        return ParityCase(objective=reward_objective(), head="value", mean_over="units", rows=_with_margins)
    policy = PolicyLossOptions(
        clip_eps_low=0.2,
        clip_eps_high=0.3,
        dual_clip=3.0,
        entropy_coef=0.01,
        kl_loss_coef=0.05,
        kl_estimator="k3",
    )
    return ParityCase(objective=policy_objective(policy), mean_over="rows")


_TEACHER_HIDDEN = 6


def _distilled_rows(rows: TrainingRows) -> TrainingRows:
    """Each row by itself, with hidden states of a teacher that no layout has to compute."""
    hidden = np.random.default_rng(len(rows)).normal(size=(int(rows.num_targets.sum()), _TEACHER_HIDDEN))
    return replace(rows, unit_ids=np.arange(len(rows))).with_fields({HIDDEN: hidden.astype(np.float32)})


def _drawn_teacher(layer: OutputLayer) -> tuple[Tensor, OutputDistribution]:
    """A teacher's output layer of random weights: those of the tokens that this rank's shard has."""
    of, rows = layer.distribution, len(layer.weight)
    whole = torch.zeros(rows * layer.group.size(), _TEACHER_HIDDEN)  # padded as the student's
    whole[: of.vocab_size].normal_(generator=torch.Generator().manual_seed(7))
    own = whole[layer.group.rank() * rows :][:rows].to(layer.weight)
    return own, OutputDistribution(vocab_size=of.vocab_size, chunk_tokens=of.chunk_tokens, soft_cap=5.0)


def _chats(rows: TrainingRows) -> TrainingRows:
    """Rows of their own, with a loss on some of their targets, as of chats whose every turn is trained."""
    return replace(rows, unit_ids=np.arange(len(rows)), loss_mask=np.arange(rows.num_targets.sum()) % 4 != 1)


def _with_margins(rows: TrainingRows) -> TrainingRows:
    """Pairs whose loss looks at the last target of each row, with a margin."""
    pairs = _pairs(rows)
    mask = np.zeros(int(pairs.num_targets.sum()), dtype=np.bool_)
    mask[np.cumsum(pairs.num_targets) - 1] = True
    margins = np.repeat(0.3 * np.arange(pairs.num_units, dtype=np.float32), 2)
    return replace(pairs, loss_mask=mask).with_fields({}, scalars={"margin": margins})


def _with_labels(rows: TrainingRows) -> TrainingRows:
    """A label between three tokens for every third target, each row a unit of its own."""
    number = np.arange(int(rows.num_targets.sum()))
    mask = number % 3 == 1
    shares = np.stack([number % 5, number % 7, np.ones_like(number)], 1).astype(np.float32)
    shares *= mask[:, None] / shares.sum(1, keepdims=True)
    return replace(rows, unit_ids=np.arange(len(rows)), loss_mask=mask).with_fields({"shares": shares})


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


def _pairs(rows: TrainingRows) -> TrainingRows:
    """The first two rows of each group."""
    starts = np.flatnonzero(np.diff(rows.unit_ids, prepend=-1))
    pairs = rows.take(np.stack([starts, starts + 1], axis=1).ravel())
    return replace(pairs, unit_ids=np.arange(len(pairs)) // 2)


def _labelled(rows: TrainingRows) -> TrainingRows:
    """Each row alone, every other one desirable, and one reference point for all."""
    numbers = np.arange(len(rows))
    scalars = {"desirable": (numbers % 2).astype(np.float32), "kl": np.full(len(rows), 0.2, dtype=np.float32)}
    return replace(rows, unit_ids=numbers).with_fields({}, scalars=scalars)


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
