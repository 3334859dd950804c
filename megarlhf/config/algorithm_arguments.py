"""Options of what is optimized: estimators, the KL, clipping and averages."""

from dataclasses import dataclass
from typing import Literal

AdvantageEstimator = Literal["gae", "reinforce", "reinforce_baseline", "rloo", "group_norm", "dr_grpo"]


@dataclass(frozen=True, kw_only=True)
class AlgorithmArguments:
    """What is optimized."""

    advantage_estimator: AdvantageEstimator = "gae"
    """gae is PPO with a critic. Without one: reinforce (REINFORCE++), reinforce_baseline (minus the prompt's mean
    reward), rloo (minus the mean of the prompt's other samples), group_norm (GRPO), dr_grpo (GRPO without the std)."""
    gamma: float = 1.0
    """Discount per token."""
    lambd: float = 0.95
    """Lambda of generalized advantage estimation."""
    init_kl_coef: float = 0.01
    """Weight of the KL divergence from the reference model, at the start. 0: no KL term."""
    kl_target: float | None = None
    """KL per token (kl/mean) that an adaptive weight steers to. None: the weight stays at init_kl_coef."""
    kl_horizon: int = 10000
    """Samples over which the adaptive weight moves."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of the KL from one token, r = log(policy / reference): k1 is r, k2 is r^2 / 2, k3 is exp(-r) - 1 + r."""
    use_kl_loss: bool = False
    """Put the KL term into the loss instead of the reward."""
    eps_clip: float = 0.2
    """Policy ratios below 1 - eps_clip (and above 1 + eps_clip) earn no further gain."""
    eps_clip_high: float | None = None
    """Clip range above 1, if it differs. None: the same as eps_clip."""
    dual_clip: float | None = None
    """Bound on the ratio where the advantage is negative, above 1 (dual-clip PPO). None: no bound."""
    use_tis: bool | None = None
    """Weigh each token's policy loss by p(trainer) / p(vLLM) under the weights that sampled it, bounded by tis_cap
    (truncated importance sampling) or tis_mask_range. None: on unless all phases compute in fp32."""
    tis_cap: float = 2.0
    """Largest such weight, at least 1."""
    tis_mask_range: tuple[float, float] | None = None
    """Leave tokens out of the policy loss whose weight is outside of these two bounds (IcePop) instead of capping it,
    such as 0.5 5. None: cap."""
    value_clip: float = 0.2
    """Range around the rollout's values within which the critic's loss follows its prediction."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    reward_clip_range: tuple[float, float] = (-10.0, 10.0)
    """Lowest and highest reward; others are clamped."""
    normalize_reward: bool = False
    """With reward_pretrain: subtract from each model's score the mean that its config.json has and divide by the std
    there (megarlhf rm writes both); other sources stay as they are. Without: subtract the running mean of rewards and
    divide by their running std."""
    normalize_advantages: bool = True
    """Shift and scale advantages to mean 0 and std 1 over all response tokens of a step."""
    overlong_filter: bool = False
    """Leave responses that were cut at generate_max_len out of the losses; their rewards count in their group's
    baseline."""
    overlong_buffer_len: int | None = None
    """Tokens before generate_max_len over which a response's reward falls, linearly, by up to overlong_penalty_factor
    (DAPO). None: no penalty."""
    overlong_penalty_factor: float = 1.0
    """Penalty of a response of generate_max_len tokens."""
    dynamic_filtering: bool = False
    """Replace prompts whose samples all have the same reward by fresh ones (DAPO's dynamic sampling); data is then used
    up faster."""
    dynamic_filtering_reward_range: tuple[float, float] | None = None
    """Keep the prompts whose samples' mean reward lies between these two numbers, such as 0 1. None: those whose
    rewards differ."""
    dynamic_filtering_max_rounds: int = 10
    """Rounds of generating in a step, at most; then it goes on with the prompts that it has, if min_result_fraction
    allows it."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """Average of the policy loss: over all tokens of a batch, or over each response first and then over responses."""
    critic_loss_aggregation: Literal["token", "sequence"] = "token"
    """The same of the critic's loss (gae only)."""
