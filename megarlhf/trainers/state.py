"""What the RL loop remembers from step to step, saves with each checkpoint, and leaves behind when it fails."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from megarlhf.algos.kl import KLController
from megarlhf.config.algorithm_arguments import AlgorithmArguments
from megarlhf.formats.run_checkpoints import SaveFailedError
from megarlhf.trainers.best import Best
from megarlhf.trainers.roles import RoleFailedError, Roles


@dataclass(frozen=True)
class RewardMoments:
    """Running mean and variance of outcome rewards (Welford; Chan's merge of batches), for --normalize_reward."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean

    def merged(self, rewards: Sequence[float]) -> "RewardMoments":
        """These moments with a batch taken in."""
        n, mean = len(rewards), sum(rewards) / len(rewards)
        delta, total = mean - self.mean, self.count + n
        squares = self.squares + sum((r - mean) ** 2 for r in rewards) + delta**2 * self.count * n / total
        return RewardMoments(count=total, mean=self.mean + delta * n / total, squares=squares)

    def scale(self) -> tuple[float, float]:
        """(shift, divisor) that standardise a reward; the divisor is 1 while all rewards were equal."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return self.mean, deviation if deviation > 1e-8 else 1.0


@dataclass
class LoopState:
    """Everything besides weights and optimizers that shapes the next step; changed when a step is finished, at once.

    Prompt order and sampling seeds are functions of (seed, consumed prompts, step).
    """

    step: int  # last finished step; also the policy version
    kl_controller: KLController
    reward_moments: RewardMoments = field(default_factory=RewardMoments)
    consumed_prompts: int = 0  # drawn so far
    consumed_before: int = 0  # before the last finished step
    untrained_steps: int = 0  # so far, for want of rewards
    untrained_in_a_row: int = 0  # the last steps among them
    best: Best = Best()  # evaluation so far
    rollout_steps_left: int = 0  # of the engines outside of FP8; -1: all
    rollout_fallbacks: int = 0  # so far
    unlogged: dict[str, float] | None = None  # metrics of the last finished step, until it is evaluated and logged
    updating: bool = False  # optimizer steps are under way: the weights are of no step; not saved

    @staticmethod
    def fresh(algorithm: AlgorithmArguments) -> "LoopState":
        """State before the first step."""
        controller = KLController(algorithm.init_kl_coef, target=algorithm.kl_target, horizon=algorithm.kl_horizon)
        return LoopState(step=0, kl_controller=controller)

    def finish_step(self, *, consumed_prompts: int, trained: bool) -> None:
        """Count a step whose last optimizer step is made, or that is not trained."""
        self.step += 1
        self.updating = False
        self.consumed_before, self.consumed_prompts = self.consumed_prompts, consumed_prompts
        self.untrained_steps += not trained
        self.untrained_in_a_row = 0 if trained else self.untrained_in_a_row + 1

    def to_json(self) -> dict[str, Any]:
        """For run_state.json."""
        saved = asdict(self) | {"kl_controller": self.kl_controller.state_dict()}
        del saved["updating"]
        return saved

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `to_json`."""
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.reward_moments = RewardMoments(**state["reward_moments"])
        self.best = Best.of_state(state)
        for name in ("step", "consumed_prompts", "untrained_steps", "untrained_in_a_row"):
            setattr(self, name, int(state[name]))
        for name in ("rollout_steps_left", "rollout_fallbacks", "consumed_before"):
            setattr(self, name, int(state.get(name, 0)))  # older checkpoints have none
        self.unlogged = state.get("unlogged")


@contextmanager
def saved_on_failure(roles: Roles, state: LoopState) -> Iterator[None]:
    """Save the last finished step when the block raises, and say so in the error; the error goes on.

    Nothing is saved where that step is on disk already, where a training role itself failed, or in the middle of a
    step's updates: then the weights are of no step.
    """
    first = state.step
    try:
        yield
    except SaveFailedError:  # of the last step
        raise
    except Exception as error:
        if state.step > first and state.step != roles.checkpoint.last_saved:
            error.add_note(_save(roles, state, error))
        raise


def _save(roles: Roles, state: LoopState, error: Exception) -> str:
    """Save and say what came of it."""
    if state.updating or (isinstance(error, RoleFailedError) and error.trains):
        return f"the weights of step {state.step} are lost: the last checkpoint saved before is the last good state"
    try:
        with roles.phases.rescue():
            roles.checkpoint.save(state.step, state.to_json())
    except Exception as failure:
        return f"and step {state.step} could not be saved ({type(failure).__name__}: {failure})"
    return f"the state after step {state.step} is saved: mend the cause, and continue with load"
