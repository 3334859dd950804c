"""What the RL loop works with. On a cluster each role is a group of processes; in a unit test, a plain object."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megarlhf.data.types import Prompt, Sample, TrainingRow


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """One optimizer step of a role."""

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    outputs: list[Tensor]  # per row, in the caller's order: log-probs or values before the step


class RoleFailedError(RuntimeError):
    """A role's process died, raised, or did not answer in time.

    Attributes:
        trains: whether the role holds weights that are trained; they are lost.
    """

    def __init__(self, message: str, *, trains: bool) -> None:
        super().__init__(message)
        self.trains = trains


class RolloutRole(Protocol):
    """The inference engines."""

    def generate(self, prompts: Sequence[Prompt], *, step: int) -> list[Sample]:
        """n_samples_per_prompt samples of each prompt; seeds depend on (run seed, step, place, sample) alone."""

    def generate_greedy(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """One most likely response of each prompt."""


class RewardRole(Protocol):
    """What scores responses."""

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their rewards; None where there is no result."""


class ActorRole(Protocol):
    """The policy in training, and the reference beside it."""

    def log_probs(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        """Per row: [num_targets] log-probs under the present weights."""

    def ref_log_probs(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        """Per row: [num_targets] log-probs under the reference."""

    def update(self, rows: Sequence[TrainingRow], *, denominator: float) -> UpdateResult:
        """One optimizer step."""


class CriticRole(Protocol):
    """The value function in training."""

    def values(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        """Per row: [num_targets] values of the states before its targets."""

    def update(self, rows: Sequence[TrainingRow], *, denominator: float) -> UpdateResult:
        """One optimizer step."""


class WeightSyncRole(Protocol):
    """Brings the actor's weights to the inference engines."""

    def push(self, version: int) -> dict[str, float]:
        """Move, verify, and return metrics; the engines answer with this version from now on."""


class Phases(Protocol):
    """Who has the devices. Each phase wakes and puts to sleep what it must, and is timed."""

    def rollout(self) -> AbstractContextManager[None]:
        """The inference engines have the devices."""

    def train(self) -> AbstractContextManager[None]:
        """The training roles have the devices."""

    def sync(self) -> AbstractContextManager[None]:
        """Both are awake, to move weights."""

    def rescue(self) -> AbstractContextManager[None]:
        """The run is failing: the inference engines are ended, and the training roles have the devices."""


class CheckpointRole(Protocol):
    """Saves the training roles.

    Attributes:
        last_saved: step of the last complete checkpoint that this process has written; None before.
    """

    last_saved: int | None

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        """A complete checkpoint of every role, or none."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Everything the loop talks to."""

    phases: Phases
    rollout: RolloutRole
    reward: RewardRole
    actor: ActorRole
    critic: CriticRole | None
    sync: WeightSyncRole
    checkpoint: CheckpointRole
