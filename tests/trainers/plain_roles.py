"""The loop's roles as plain objects that write down what happens to them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.config.arguments import (
    AlgorithmArguments,
    BatchArguments,
    LoggingArguments,
    ModelArguments,
    OptimizerArguments,
    PPOConfig,
    PromptDataArguments,
    RewardArguments,
    RolloutArguments,
)
from megarlhf.data.types import Prompt, Sample, TrainingRow
from megarlhf.trainers.roles import Roles, UpdateResult


def make_config(
    save: Path,
    *,
    batch: dict[str, Any] | None = None,
    algorithm: dict[str, Any] | None = None,
    logging: dict[str, Any] | None = None,
    reward: dict[str, Any] | None = None,
    freezing_actor_steps: int = -1,
) -> PPOConfig:
    """A small configuration; nothing in it is read from disk."""
    sizes = {"train_iters": 3, "rollout_batch_size": 4, "n_samples_per_prompt": 2, "global_batch_size": 4}
    return PPOConfig(
        model=ModelArguments(pretrain="model"),
        batch=BatchArguments(**(sizes | (batch or {}))),
        optimizer=OptimizerArguments(freezing_actor_steps=freezing_actor_steps),
        algorithm=AlgorithmArguments(**(algorithm or {})),
        rollout=RolloutArguments(prompt_max_len=8, generate_max_len=8),
        data=PromptDataArguments(prompt_data="prompts.jsonl"),
        reward=RewardArguments(**(reward or {})),
        logging=LoggingArguments(save=str(save), **(logging or {})),
    )


def make_prompts(count: int = 6) -> list[Prompt]:
    """Prompts of two tokens."""
    return [Prompt(index=i, text=f"p{i}", token_ids=(10 + i, 3), label=str(i)) for i in range(count)]


class PlainRoles:
    """All roles in one object; `events` is the order in which the loop called them."""

    def __init__(self, *, without_result: Sequence[tuple[int, int]] = (), difference: float = 0.0) -> None:
        self.events: list[str] = []
        self.updates: list[tuple[str, list[TrainingRow], float]] = []
        self.saved: dict[int, dict[str, Any]] = {}
        self.phase, self.version = "none", -1
        self.last_saved: int | None = None
        self._without_result, self._difference = set(without_result), difference

    def roles(self, *, critic: bool) -> Roles:
        return Roles(
            phases=self,
            rollout=self,
            reward=self,
            actor=_Training(self, "actor"),
            critic=_Training(self, "critic") if critic else None,
            sync=self,
            checkpoint=self,
        )

    @contextmanager
    def _enter(self, name: str) -> Iterator[None]:
        self.phase = name
        yield
        self.phase = "none"

    def rollout(self) -> Any:
        return self._enter("rollout")

    def train(self) -> Any:
        return self._enter("train")

    def sync(self) -> Any:
        return self._enter("sync")

    def rescue(self) -> Any:
        self.events.append("rescue")
        return self._enter("train")

    def generate(self, prompts: Sequence[Prompt], *, step: int) -> list[Sample]:
        assert self.phase == "rollout"
        assert self.version == step - 1, "samples must come from the weights of the step before"
        self.events.append(f"generate {step}")
        return [self._sample(p, g, s, step) for g, p in enumerate(prompts) for s in range(2)]

    def generate_greedy(self, prompts: Sequence[Prompt]) -> list[Sample]:
        assert self.phase == "rollout"
        self.events.append("evaluate")
        return [self._sample(p, g, 0, 0) for g, p in enumerate(prompts)]

    def _sample(self, prompt: Prompt, group: int, sample: int, step: int) -> Sample:
        length = 1 + (group + sample + step) % 3
        return Sample(
            prompt=prompt,
            group_id=group,
            sample_id=sample,
            response_ids=tuple(range(20, 20 + length)),
            rollout_log_probs=(-1.0,) * length,
            response_text="r",
            finish_reason="stop" if sample else "length",
            weight_version=self.version,
        )

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        return [
            replace(s, reward=None if (s.group_id, s.sample_id) in self._without_result else float(s.sample_id))
            for s in samples
        ]

    def push(self, version: int) -> dict[str, float]:
        assert self.phase == "sync"
        self.version = version
        self.events.append(f"push {version}")
        return {"sync/version": float(version)}

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        assert self.phase == "train", "weights are on the device in this phase alone"
        self.events.append(f"save {step}")
        self.last_saved = step
        self.saved[step] = run_state

    def forward(self, rows: Sequence[TrainingRow], shift: float) -> list[Tensor]:
        assert self.phase == "train"
        return [torch.full((row.num_targets,), -1.0 + shift) for row in rows]

    def before_update(self, name: str) -> None:
        """For subclasses that fail there."""

    def difference(self) -> float:
        return self._difference


class _Training:
    """Actor or critic."""

    def __init__(self, parent: PlainRoles, name: str) -> None:
        self._parent, self._name = parent, name

    def log_probs(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        return self._parent.forward(rows, self._parent.difference())

    def ref_log_probs(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        return self._parent.forward(rows, -0.5)

    def values(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        return self._parent.forward(rows, 1.25)

    def update(self, rows: Sequence[TrainingRow], *, denominator: float) -> UpdateResult:
        self._parent.before_update(self._name)
        self._parent.events.append(f"update {self._name}")
        self._parent.updates.append((self._name, list(rows), denominator))
        outputs = self._parent.forward(rows, self._parent.difference())
        metrics = {"clip_frac": 0.0, "value_mean": 0.0} if self._name == "critic" else {"clip_frac": 0.0, "kl": 0.5}
        return UpdateResult(loss=1.0, metrics=metrics, grad_norm=1.0, learning_rate=0.1, outputs=outputs)
