"""What the RL loop works with. On a cluster each role is a group of processes; in a unit test, a plain object."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megarlhf.algos.kl import KLEstimator
from megarlhf.config.precision import EnginePhase
from megarlhf.data.types import Floats, Prompt, Rollout, Sample


@dataclass(frozen=True, kw_only=True)
class LogProbDifference:
    """How far the trainer's log-probs of response tokens are from the inference engine's, as sums over tokens."""

    num_tokens: int
    absolute: float  # sum of |trainer - engine|, nats
    largest: float  # of these
    kl: float  # sum of estimates of KL(engine || trainer), nats

    @staticmethod
    def between(trainer: Floats, engine: Floats) -> "LogProbDifference":
        """Of the same tokens: [t] and [t].

        The engine sampled them, so exp(d) - 1 - d with d = trainer - engine is the k3 estimate of KL(engine || trainer)
        at a token, J. Schulman, joschu.net/blog/kl-approx.html: never negative, and its mean is the KL.
        """
        signed = trainer.astype(np.float64) - engine
        difference = np.abs(signed)
        largest = float(difference.max()) if len(difference) else 0.0
        with np.errstate(over="ignore"):  # infinite, and past every budget
            kl = float((np.expm1(signed) - signed).sum())
        return LogProbDifference(num_tokens=len(difference), absolute=float(difference.sum()), largest=largest, kl=kl)

    def __add__(self, other: "LogProbDifference") -> "LogProbDifference":
        """Of both sets of tokens."""
        return LogProbDifference(
            num_tokens=self.num_tokens + other.num_tokens,
            absolute=self.absolute + other.absolute,
            largest=float(np.maximum(self.largest, other.largest)),  # which keeps a NaN
            kl=self.kl + other.kl,
        )


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """One optimizer step of a role."""

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    difference: LogProbDifference | None = None  # of the log-probs before it, if no pass before has measured it
    seconds: float = 0.0  # of this rank, up to where it waits for others to sum gradients


class RoleFailedError(RuntimeError):
    """A role's process died, raised, or did not answer in time.

    Attributes:
        trains: whether weights that are trained are lost with it.
    """

    def __init__(self, message: str, *, trains: bool) -> None:
        super().__init__(message)
        self.trains = trains


class NodeLostError(RuntimeError):
    """A node has gone that the run has processes on, and there is no other for them."""


class RolloutRole(Protocol):
    """The inference engines.

    Attributes:
        in_fp8: whether they compute in FP8.
    """

    in_fp8: bool

    def generate(self, prompts: Sequence[Prompt], *, step: int, first_place: int = 0) -> Rollout:
        """n_samples_per_prompt samples of each prompt; seeds depend on (run seed, step, place, sample) alone.

        Args:
            first_place: place in the step of the first prompt, where others of it have been answered before.
        """

    def answer(self, prompts: Sequence[Prompt], *, n_samples: int, temperature: float | None) -> Rollout:
        """n_samples answers to each of an evaluation's prompts; at temperature 0 the likeliest, None: at the run's.

        Seeds depend on (run seed, row in its data set, sample) alone.
        """


    def set_fp8(self, on: bool) -> None:
        """Compute in FP8 or not; a sync comes before they generate again."""


class RewardRole(Protocol):
    """What scores responses."""

    def score(self, rollout: Rollout) -> list[Sample]:
        """The samples with their rewards and what these are the sum of; None where there is no result."""


class TrainingRole(Protocol):
    """A model in training. What it computes of a step's samples stays with their tokens, where they are trained on.

    Arrays have one number for each response token of the step's samples, in the order of the samples.
    """

    def begin(self, rollout: Rollout, mini_batches: Sequence[Sequence[int]]) -> None:
        """Take the step's samples for all calls until the next.

        Args:
            mini_batches: indices of the samples of each optimizer step; together all of them, once.
        """

    def keep(self, fields: Mapping[str, Floats], *, scalars: Mapping[str, Floats]) -> None:
        """Give the samples fields of the loss: numbers for each response token, and [n] for each sample."""

    def update(self, mini_batch: int, *, denominator: float) -> UpdateResult:
        """One optimizer step on one of the mini-batches."""

    def fall_back(self, phase: EnginePhase, why: str) -> bool:
        """Let a phase leave FP8, for fp8_fallback_steps; False where it has already."""

    def stop(self) -> None:
        """End its processes: the run is interrupted, and another thread may wait for what they compute."""

    def precision_report(self) -> tuple[dict[str, float], list[str]]:
        """Metrics of the step by phase and key, and what happened, in sentences; once a step, at its end."""


class ActorRole(TrainingRole, Protocol):
    """The policy in training, and the reference beside it."""

    def log_probs(self) -> LogProbDifference:
        """Keep `old_log_probs`: log-probs under the present weights."""

    def ref_log_probs(self) -> None:
        """Keep `ref_log_probs`: log-probs under the reference."""

    def kl(self, estimator: KLEstimator) -> Floats:
        """Estimated KL at each token, of old_log_probs to ref_log_probs; both are kept already."""


class CriticRole(TrainingRole, Protocol):
    """The value function in training."""

    def values(self) -> Floats:
        """Keep `old_values`, values of the states before each token, and return them."""


class WeightSyncRole(Protocol):
    """Brings the actor's weights to the inference engines; the loop does not know how.

    What every transport keeps:

    - All weights have a version. Samples carry the version that generated them, and the loop refuses any other.
    - A checksum covers all of them. The trainer computes it where it holds them, each engine from what it has received,
      and an engine whose checksum differs raises; one that is left with a mixture of versions refuses to generate.
    - `push` returns only when every engine has reported back the version and the checksum that were sent.
    - Tensors have Hugging Face names and come in the order of the architecture's table, layer by layer.
    """

    def push(self, version: int) -> dict[str, float]:
        """Move the weights as they are now; the engines answer with this version from now on.

        Args:
            version: the last finished step, 0 before the first.
        Returns:
            Metrics: sync/version and sync/bytes, the bytes of all weights.
        Raises:
            RuntimeError: an engine reports another version or checksum.
            RoleFailedError: a process died, or refused what it was sent.
        """


class Phases(Protocol):
    """What a run is doing. Each phase is shown and timed, and gives the devices to the roles that it is for."""

    def rollout(self) -> AbstractContextManager[None]:
        """The inference engines generate."""

    def reward(self, *, is_last: bool = True) -> AbstractContextManager[None]:
        """Responses are scored; if they may not be the step's last, the inference engines keep their weights."""

    def judge(self) -> AbstractContextManager[None]:
        """The answers of an evaluation are scored; the inference engines keep their weights."""

    def train(self) -> AbstractContextManager[None]:
        """The training roles have the devices; a sync comes before the next rollout."""

    def experience(self) -> AbstractContextManager[None]:
        """Inside of train: what comes before the updates."""

    def restart(self) -> AbstractContextManager[None]:
        """The inference engines alone have the devices, to start anew; a sync follows."""

    def sync(self) -> AbstractContextManager[None]:
        """The weights of actor and engines are awake, to be moved."""

    def evaluate(self) -> AbstractContextManager[None]:
        """The inference engines answer held-out prompts."""

    def save(self) -> AbstractContextManager[None]:
        """The training roles are awake, to be saved; the engines keep their weights."""

    def rescue(self) -> AbstractContextManager[None]:
        """The run is failing: the inference engines are ended, and the training roles are awake, to be saved."""

    def seconds(self) -> dict[str, float]:
        """Metrics: seconds in each phase since the last call."""

    def memory(self) -> dict[str, float]:
        """Metrics: the most that each part of each training role has held on a device."""


class CheckpointRole(Protocol):
    """Saves the training roles.

    Attributes:
        last_saved: step of the last complete checkpoint that this process has written; None before.
    """

    last_saved: int | None

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        """A complete checkpoint of every role, or none.

        Raises:
            SaveFailedError: none, and the roles can go on.
        """


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Everything the loop talks to.

    Attributes:
        side_by_side: actor, critic and reward models have devices of their own.
        slowest_ranks: metrics of the ranks of each role, once a step, for the calls since the last time.
    """

    phases: Phases
    rollout: RolloutRole
    reward: RewardRole
    actor: ActorRole
    critic: CriticRole | None
    sync: WeightSyncRole
    checkpoint: CheckpointRole
    side_by_side: bool = False
    slowest_ranks: Callable[[], dict[str, float]] = dict
