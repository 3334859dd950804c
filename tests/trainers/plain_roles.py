"""The loop's roles as plain objects that write down what happens to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megarlhf.algos.kl import KLEstimator
from megarlhf.config.arguments import (
    AlgorithmArguments,
    BatchArguments,
    LoggingArguments,
    OptimizerArguments,
    PPOConfig,
    PromptDataArguments,
    RewardArguments,
    RLModelArguments,
    RolloutArguments,
)
from megarlhf.config.precision import EnginePhase, RLPrecisionArguments
from megarlhf.data.partition import DataParallelSplit, rows_of
from megarlhf.data.planning import PackingOptions
from megarlhf.data.types import Floats, GroupTokens, Prompt, Rollout, Sample, TrainingRows
from megarlhf.trainers.roles import LogProbDifference, Roles, UpdateResult

PACKING = PackingOptions(max_tokens=64, share_prefix=False)


def make_config(
    save: Path,
    *,
    batch: dict[str, Any] | None = None,
    algorithm: dict[str, Any] | None = None,
    logging: dict[str, Any] | None = None,
    reward: dict[str, Any] | None = None,
    precision: dict[str, Any] | None = None,
    freezing_actor_steps: int = -1,
) -> PPOConfig:
    """A small configuration; nothing in it is read from disk."""
    sizes = {"train_iters": 3, "rollout_batch_size": 4, "n_samples_per_prompt": 2, "global_batch_size": 4}
    return PPOConfig(
        model=RLModelArguments(pretrain="model"),
        batch=BatchArguments(**(sizes | (batch or {}))),
        optimizer=OptimizerArguments(freezing_actor_steps=freezing_actor_steps),
        algorithm=AlgorithmArguments(**(algorithm or {})),
        precision=RLPrecisionArguments(**(precision or {})),
        rollout=RolloutArguments(prompt_max_len=8, generate_max_len=8),
        data=PromptDataArguments(prompt_data="prompts.jsonl"),
        reward=RewardArguments(**(reward or {})),
        logging=LoggingArguments(save=str(save), **(logging or {})),
    )


def make_prompts(count: int = 6) -> list[Prompt]:
    """Prompts of two tokens."""
    ids = [np.array([10 + i, 3], dtype=np.int32) for i in range(count)]
    return [Prompt(index=i, text=f"p{i}", token_ids=ids[i], label=str(i)) for i in range(count)]


def tokens_of(samples: Sequence[Sample], *, log_prob: float = -1.0) -> tuple[GroupTokens | None, ...]:
    """Tokens of samples by group: 20, 21, ...; samples that are not there have one token."""
    groups: list[GroupTokens | None] = []
    for group in range(1 + max(sample.group_id for sample in samples)):
        members = {sample.sample_id: sample for sample in samples if sample.group_id == group}
        lengths = [members[i].response_length if i in members else 1 for i in range(1 + max(members, default=0))]
        groups.append(
            GroupTokens(
                prompt_ids=next(iter(members.values())).prompt.token_ids,
                response_ids=np.concatenate([20 + np.arange(length, dtype=np.int32) for length in lengths]),
                rollout_log_probs=np.full(sum(lengths), log_prob, dtype=np.float32),
                lengths=np.array(lengths),
            )
            if members
            else None
        )
    return tuple(groups)


def judged(sample: Sample, reward: float | None) -> Sample:
    """As a reward function's."""
    return replace(sample, reward=reward, parts={"function": reward})


class PlainRoles:
    """All roles in one object; `events` is the order in which the loop called them."""

    def __init__(self, *, without_result: Sequence[tuple[int, int]] = (), difference: float = 0.0) -> None:
        self.events: list[str] = []
        self.updates: list[tuple[str, TrainingRows, float]] = []
        self.saved: dict[int, dict[str, Any]] = {}
        self.stopped: list[str] = []
        self.begun: list[tuple[str, int]] = []  # role and number of samples
        self.prompts: list[Prompt] = []  # of the last rollout
        self.phase, self.version = "none", -1
        self.last_saved: int | None = None
        self._without_result, self._difference = set(without_result), difference
        self.in_fp8 = False  # of the engines
        self.side_by_side = False

    def roles(self, *, critic: bool) -> Roles:
        return Roles(
            side_by_side=self.side_by_side,
            phases=_Phases(self),
            rollout=self,
            reward=self,
            actor=_Training(self, "actor"),
            critic=_Training(self, "critic") if critic else None,
            sync=self,
            checkpoint=self,
        )

    def generate(self, prompts: Sequence[Prompt], *, step: int, first_place: int = 0) -> Rollout:
        assert self.phase == "rollout"
        assert self.version == step - 1, "samples must come from the weights of the step before"
        self.events.append(f"generate {step}")
        return self.rollout_of(prompts, step)

    def rollout_of(self, prompts: Sequence[Prompt], step: int) -> Rollout:
        self.prompts = list(prompts)
        samples = [self._sample(p, g, s, step) for g, p in enumerate(prompts) for s in range(2)]
        return Rollout(samples=samples, tokens=tokens_of(samples))

    def answer(self, prompts: Sequence[Prompt], *, n_samples: int, temperature: float | None) -> Rollout:
        assert self.phase == "evaluate"
        self.events.append("evaluate" if temperature == 0 else f"evaluate {n_samples} at {temperature}")
        samples = [self._sample(p, g, s, 0) for g, p in enumerate(prompts) for s in range(n_samples)]
        return Rollout(samples=samples, tokens=tokens_of(samples))

    def set_fp8(self, on: bool) -> None:
        assert self.phase == "restart" and on != self.in_fp8
        self.in_fp8 = on
        self.events.append(f"restart {'in' if on else 'out of'} fp8")

    def _sample(self, prompt: Prompt, group: int, sample: int, step: int) -> Sample:
        return Sample(
            prompt=prompt,
            group_id=group,
            sample_id=sample,
            response_length=1 + (group + sample + step) % 3,
            response_text="r",
            finish_reason="stop" if sample else "length",
            weight_version=self.version,
        )

    def score(self, rollout: Rollout) -> list[Sample]:
        assert self.phase in ("reward", "judge")
        lost = self._without_result
        return [
            judged(s, None if (s.group_id, s.sample_id) in lost else float(s.sample_id)) for s in rollout.samples
        ]

    def push(self, version: int) -> dict[str, float]:
        assert self.phase == "sync"
        self.version = version
        self.events.append(f"push {version}")
        return {"sync/version": float(version)}

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        assert self.phase == "save", "what is saved is on the device, and the engines keep their weights"
        self.events.append(f"save {step}")
        self.last_saved = step
        self.saved[step] = run_state

    def forward(self, rows: TrainingRows, shift: float) -> Floats:
        assert self.phase == "train" or self.side_by_side
        return np.full(int(rows.num_targets.sum()), -1.0 + shift, dtype=np.float32)

    def before_update(self, name: str) -> None:
        """For subclasses that fail there."""

    def difference(self) -> float:
        return self._difference


class _Training:
    """Actor or critic, on one rank."""

    def __init__(self, parent: PlainRoles, name: str) -> None:
        self._parent, self._name = parent, name

    def stop(self) -> None:
        self._parent.stopped.append(self._name)

    def begin(self, rollout: Rollout, mini_batches: Sequence[Sequence[int]]) -> None:
        self._parent.begun.append((self._name, len(rollout.samples)))
        split = DataParallelSplit(rollout.samples, mini_batches, num_ranks=1, packing=PACKING)
        (partition,) = split.partitions
        self.rows = rows_of(partition, [rollout.tokens[group] for group in partition.groups])
        self._plan = partition.plan

    def keep(self, fields: Mapping[str, Floats], *, scalars: Mapping[str, Floats]) -> None:
        self.rows = self.rows.with_fields(fields, scalars=scalars)

    def _forward(self, name: str, shift: float) -> Floats:
        found = self._parent.forward(self.rows, shift)
        self.keep({name: found}, scalars={})
        return found

    def log_probs(self) -> LogProbDifference:
        found = self._forward("old_log_probs", self._parent.difference())
        return LogProbDifference.between(found, self.rows.fields["rollout_log_probs"])

    def fall_back(self, phase: EnginePhase, why: str) -> bool:
        return False

    def precision_report(self) -> tuple[dict[str, float], list[str]]:
        return {}, []

    def ref_log_probs(self) -> None:
        self._forward("ref_log_probs", -0.5)

    def kl(self, estimator: KLEstimator) -> Floats:
        assert estimator == "k1"
        return self.rows.fields["old_log_probs"] - self.rows.fields["ref_log_probs"]

    def values(self) -> Floats:
        return self._forward("old_values", 1.25)

    def update(self, mini_batch: int, *, denominator: float) -> UpdateResult:
        self._parent.before_update(self._name)
        self._parent.events.append(f"update {self._name}")
        rows = self.rows.take(sorted(row for micro_batch in self._plan[mini_batch] for row in micro_batch))
        self._parent.updates.append((self._name, rows, denominator))
        outputs = self._parent.forward(rows, self._parent.difference())
        metrics = {"clip_frac": 0.0, "value_mean": 0.0} if self._name == "critic" else {"clip_frac": 0.0, "kl": 0.5}
        difference = None
        if self._name == "actor" and "old_log_probs" not in rows.fields:
            difference = LogProbDifference.between(outputs, rows.fields["rollout_log_probs"])
        return UpdateResult(loss=1.0, metrics=metrics, grad_norm=1.0, learning_rate=0.1, difference=difference)


class _Phases:
    """Says which phase its parent is in."""

    def __init__(self, parent: PlainRoles) -> None:
        self._parent = parent

    @contextmanager
    def _enter(self, name: str) -> Iterator[None]:
        before, self._parent.phase = self._parent.phase, name
        yield
        self._parent.phase = before

    def __getattr__(self, name: str) -> Any:
        assert name in ("rollout", "reward", "train", "restart", "sync", "evaluate", "judge", "save"), name
        return lambda **_: self._enter(name)

    def experience(self) -> Any:
        assert self._parent.phase == "train" or self._parent.side_by_side
        return nullcontext()

    def rescue(self) -> Any:
        self._parent.events.append("rescue")
        return self._enter("save")

    def seconds(self) -> dict[str, float]:
        return {}

    def memory(self) -> dict[str, float]:
        return {"memory/actor/parameters_gib": 0.5}
