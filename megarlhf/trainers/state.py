"""What the RL loop remembers from step to step, and saves with each checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megarlhf.algos.kl import AdaptiveKLController, FixedKLController, KLController
from megarlhf.config.arguments import AlgorithmArguments


@dataclass
class RewardMoments:
    """Running mean and variance of outcome rewards (Welford; Chan's merge of batches), for --normalize_reward."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean

    def add(self, rewards: Sequence[float]) -> None:
        """Take in a batch."""
        n, mean = len(rewards), sum(rewards) / len(rewards)
        delta, total = mean - self.mean, self.count + n
        self.squares += sum((r - mean) ** 2 for r in rewards) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    def scale(self) -> tuple[float, float]:
        """(shift, divisor) that standardise a reward; the divisor is 1 while all rewards were equal."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return self.mean, deviation if deviation > 1e-8 else 1.0


@dataclass
class LoopState:
    """Everything besides weights and optimizers that shapes the next step.

    Prompt order and sampling seeds are functions of (seed, step), so the step stands for both.
    """

    step: int  # last finished step; also the policy version
    kl_controller: KLController
    reward_moments: RewardMoments = field(default_factory=RewardMoments)

    @staticmethod
    def fresh(algorithm: AlgorithmArguments) -> "LoopState":
        """State before the first step."""
        if algorithm.kl_target is None:
            return LoopState(step=0, kl_controller=FixedKLController(algorithm.init_kl_coef))
        controller = AdaptiveKLController(algorithm.init_kl_coef, algorithm.kl_target, algorithm.kl_horizon)
        return LoopState(step=0, kl_controller=controller)

    def to_json(self) -> dict[str, Any]:
        """For run_state.json."""
        moments = self.reward_moments
        return {
            "step": self.step,
            "kl_controller": self.kl_controller.state_dict(),
            "reward_moments": {"count": moments.count, "mean": moments.mean, "squares": moments.squares},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `to_json`."""
        self.step = int(state["step"])
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.reward_moments = RewardMoments(**state["reward_moments"])
