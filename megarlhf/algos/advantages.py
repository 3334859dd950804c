"""From outcome rewards and per-token KL to per-token advantages: GAE, REINFORCE and the group baselines.

Ragged: the tokens of all responses lie behind one another in tensors [t], and `lengths` [b] int64 says how many each
response has, at least 1. Nothing here holds a gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

GROUP_STD_EPS = 1e-6  # in reward units; the statistics run in float64, so equal rewards give 0 and not 1e-7 / 1e-6
WHITEN_EPS = 1e-8  # in squared advantage units
_BLOCK_TOKENS = 1 << 19  # of samples whose advantages are computed together
_RUN = 32  # tokens that are summed by one product
_SCAN_NUMBERS = 1 << 18  # float64 numbers of the responses that are summed side by side: they stay in the cache


@dataclass(frozen=True, kw_only=True)
class AdvantageResult:
    """What the losses need of a batch of samples, in the order of the samples."""

    advantages: Tensor  # [t] float32, whitened where that was asked for
    returns: Tensor  # [t] float32, the critic's targets, never whitened


def token_rewards(kl: Tensor | None, outcomes: Tensor, lengths: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token: -kl_coef * kl, and on the last token the outcome on top.

    arXiv:1909.08593 equation 2, its KL spread over the tokens.

    Args:
        kl: [t] float, nats; None for no penalty.
        outcomes: [b] float32, one number per sample.
        kl_coef: weight of the penalty; at 0 `kl` is not looked at.
    Returns:
        New tensor [t], dtype of `outcomes`.
    """
    if kl is None or kl_coef == 0:
        tokens = outcomes.new_zeros(int(lengths.sum()))
    else:
        tokens = (-kl_coef * kl).to(outcomes.dtype)
    tokens[lengths.cumsum(0) - 1] += outcomes
    return tokens


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimate of each response: A_t = sum_l (gamma * lambd)^l * delta_{t+l}.

    delta_t = r_t + gamma * V_{t+1} - V_t, with a V of 0 after the last token. arXiv:1506.02438 equation 16.

    Args:
        rewards: [t] float.
        values: [t] float, V of the state in which each token was chosen.
    Returns:
        advantages [t], and returns [t] = advantages + values, the critic's targets.
    """
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    next_values[lengths.cumsum(0) - 1] = 0.0
    advantages = discounted_returns(rewards + gamma * next_values - values, lengths, gamma=gamma * lambd)
    return advantages, advantages + values


def discounted_returns(rewards: Tensor, lengths: Tensor, *, gamma: float) -> Tensor:
    """Return from each token to the end of its response: G_t = r_t + gamma * G_{t+1}, summed in float64.

    The weight of REINFORCE (Williams 1992, doi:10.1007/BF00992696) with reward-to-go.

    Responses of similar length go side by side, cut into runs of _RUN tokens: a product with powers of gamma
    sums inside all runs at once, then each run takes over the sum of the one behind it.
    """
    rows = torch.split(rewards, lengths.tolist())
    sums: list[Tensor] = [rewards] * len(rows)
    order = lengths.argsort(descending=True).tolist()
    powers = gamma ** torch.arange(_RUN + 1, dtype=torch.float64)
    distance = torch.arange(_RUN)[:, None] - torch.arange(_RUN)[None, :]  # from the later token, [_RUN, _RUN]
    weights = torch.where(distance >= 0, powers[distance.clamp(min=0)], 0.0)
    while order:
        longest = -(-len(rows[order[0]]) // _RUN) * _RUN
        block, order = order[: max(1, _SCAN_NUMBERS // longest)], order[max(1, _SCAN_NUMBERS // longest) :]
        padded = torch.zeros(len(block), longest, dtype=torch.float64)  # the last token of each at the end
        for place, row in zip(padded, block, strict=True):
            place[longest - len(rows[row]) :] = rows[row]
        runs = padded.view(len(block), -1, _RUN) @ weights
        for run in range(runs.shape[1] - 2, -1, -1):
            runs[:, run].addcmul_(runs[:, run + 1, :1], powers.flip(0)[None, :-1])
        found = runs.view(len(block), longest).to(rewards.dtype)
        for place, row in zip(found, block, strict=True):
            sums[row] = place[longest - len(rows[row]) :]
    return torch.cat(sums)


def rloo_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Outcome less the mean outcome of the group's other samples: r_i - mean of r_j over j != i.

    REINFORCE leave-one-out, arXiv:2402.14740. The paper's outcome contains the sequence's KL; here, as in OpenRLHF, a
    KL in the reward comes after the baseline, token by token. Arguments, result and errors as for the next function.
    """
    centred, _, sizes = _centre_in_groups(rewards, group_ids)
    return (centred * sizes / (sizes - 1)).to(rewards.dtype)


def group_relative_advantages(
    rewards: Tensor, group_ids: Tensor, *, divide_by_std: bool, eps: float = GROUP_STD_EPS
) -> Tensor:
    """Advantage of each sample over its prompt's group: (r_i - mean_g) / (std_g + eps).

    GRPO, arXiv:2402.03300 section 4.1.2. The paper does not say which std: this is the sample std (n - 1), as TRL and
    OpenRLHF take it. divide_by_std=False is Dr. GRPO, arXiv:2503.20783, and the baseline of REINFORCE++-baseline,
    arXiv:2501.03262, which then whitens over the whole batch (the caller does).

    Args:
        rewards: [b] float32, one outcome reward per sample.
        group_ids: [b] int64, equal for the samples of one prompt, in any order.
        eps: added to the std, in reward units; unused without the division.
    Returns:
        [b] float32, zero mean within each group; the caller broadcasts it over response tokens.
    Raises:
        ValueError: a group of one sample, whose advantage is 0 and teaches nothing.
    """
    centred, group_of_sample, sizes = _centre_in_groups(rewards, group_ids)
    if divide_by_std:
        squares = torch.zeros_like(centred).index_add(0, group_of_sample, centred.square())
        centred = centred / ((squares[group_of_sample] / (sizes - 1)).sqrt() + eps)
    return centred.to(rewards.dtype)


_OUTCOME_BASELINES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gae": lambda rewards, _: rewards,
    "reinforce": lambda rewards, _: rewards,
    "reinforce_baseline": partial(group_relative_advantages, divide_by_std=False),
    "rloo": rloo_advantages,
    "group_norm": partial(group_relative_advantages, divide_by_std=True),
    "dr_grpo": partial(group_relative_advantages, divide_by_std=False),
}
_BROADCAST = ("group_norm", "dr_grpo")  # every token carries the sample's advantage, undiscounted


@torch.no_grad()
def compute_advantages(
    estimator: str,
    *,
    rewards: Tensor,
    group_ids: Tensor,
    kl: Tensor | None,
    lengths: Tensor,
    values: Tensor | None,
    kl_coef: float,
    gamma: float,
    lambd: float,
    clip_range: tuple[float, float],
    normalize: bool,
    trained: Tensor | None = None,
) -> AdvantageResult:
    """Advantages and returns of a whole rollout batch.

    In this order: clamp the outcomes, take the estimator's baseline off them (the clamp comes first, so that it acts on
    rewards and not on differences of rewards), put them on the last token with the KL penalty on every token, discount,
    and whiten over all tokens of the batch where `normalize` is set.

    | estimator | outcome baseline | per token | whitened |
    |---|---|---|---|
    | gae | none | GAE with the critic's values | if normalize |
    | reinforce | none | discounted returns; whitened it is REINFORCE++, arXiv:2501.03262 | if normalize |
    | reinforce_baseline | group mean | discounted returns | if normalize |
    | rloo | mean of the group's others | discounted returns | if normalize |
    | group_norm (GRPO) | group mean, divided by group std | A_i on every token | never |
    | dr_grpo | group mean | A_i on every token | never |

    For the last two gamma discounts the KL penalties alone: A_{i,t} = A_i - kl_coef * sum_k gamma^k * kl_{t+k}. The
    papers of group_norm, dr_grpo and reinforce_baseline have no KL in the reward: pass kl=None to have it in the loss.

    Args:
        rewards: [b] float32, one outcome reward per sample, every one finite.
        group_ids: [b] int64, equal for the samples of one prompt, in any order.
        kl: [t] float, nats; None for no penalty.
        lengths: [b] int64 response lengths in tokens, each at least 1.
        values: [t] float from the critic, for gae and no other.
        trained: [b] bool; the rewards of the others count in the baselines alone, and kl, lengths, values and the
            result are without them. None: all.
    Returns:
        Advantages and returns; without a critic the returns are the advantages before whitening.
    Raises:
        ValueError: an empty response; a reward that is not finite; a group of one sample where the baseline needs
            others.
    """
    assert (estimator == "gae") == (values is not None), "gae is built on values, the others have no use for them"
    if bool((lengths < 1).any()):
        sample = int((lengths < 1).nonzero()[0])
        raise ValueError(f"response_length=0 for sample {sample}; its reward has no token to sit on: drop it")
    num_tokens = int(lengths.sum())
    assert all(numbers is None or numbers.shape == (num_tokens,) for numbers in (kl, values)), "one for each token"
    finite = rewards.isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"reward={float(rewards[~finite][0])} for {int((~finite).sum())} of {rewards.numel()} samples; rewards "
            "must be finite (one NaN would spread over the batch): drop samples without a result"
        )
    outcomes = _OUTCOME_BASELINES[estimator](rewards.clamp(*clip_range), group_ids)
    outcomes = outcomes if trained is None else outcomes[trained]
    on_last_token = torch.zeros_like(outcomes) if estimator in _BROADCAST else outcomes
    pairs = []
    for samples, tokens in _blocks(lengths):
        sizes = lengths[samples]
        penalties = None if kl is None else kl[tokens]
        per_token = token_rewards(penalties, on_last_token[samples], sizes, kl_coef=kl_coef)
        if values is not None:
            pairs.append(gae(per_token, values[tokens], sizes, gamma=gamma, lambd=lambd))
            continue
        returns = discounted_returns(per_token, sizes, gamma=gamma)
        if estimator in _BROADCAST:
            returns += torch.repeat_interleave(outcomes[samples], sizes)
        pairs.append((returns, returns))
    advantages = torch.cat([own for own, _ in pairs])
    returns = advantages if values is None else torch.cat([own for _, own in pairs])
    if normalize and estimator not in _BROADCAST:
        advantages = whiten(advantages)
    return AdvantageResult(advantages=advantages, returns=returns)


def whiten(values: Tensor, *, eps: float = WHITEN_EPS) -> Tensor:
    """Shift and scale to zero mean and unit variance: (x - mean) / sqrt(var + eps).

    Mean and variance (divided by n, not n - 1) run in float64, so a constant batch becomes 0 and not rounding noise
    scaled up.

    Args:
        values: [t] float, t at least 1.
        eps: added to the variance, in squared units of the values.
    Returns:
        New tensor of the same shape and dtype.
    """
    centred = values.double()
    centred -= centred.mean()
    variance = centred.dot(centred) / len(centred)
    return centred.mul_((variance + eps).rsqrt()).to(values.dtype)


def _blocks(lengths: Tensor) -> list[tuple[slice, slice]]:
    """Runs of samples and of their tokens, of about _BLOCK_TOKENS: what is computed of them on the way fits a cache."""
    ends = lengths.cumsum(0)
    cuts = [0, *(1 + (ends // _BLOCK_TOKENS).diff().nonzero()[:, 0]).tolist(), len(lengths)]
    bounds = [0, *ends.tolist()]
    runs = [(first, last) for first, last in zip(cuts[:-1], cuts[1:], strict=True) if first < last]
    return [(slice(first, last), slice(bounds[first], bounds[last])) for first, last in runs]


def _centre_in_groups(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r_i - mean_g as [b] float64, and each sample's dense group number and group size, [b]; a group of one raises."""
    ids, group_of_sample, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if bool((counts < 2).any()):
        raise ValueError(
            f"group_id={int(ids[counts < 2][0])} has 1 sample; a group baseline needs at least 2 (alone, its advantage "
            "is 0 or undefined): set n_samples_per_prompt to 2 or more, and drop groups that lost their other samples"
        )
    own, sizes = rewards.double(), counts[group_of_sample]
    sums = torch.zeros_like(own).index_add(0, group_of_sample, own)
    return own - sums[group_of_sample] / sizes, group_of_sample, sizes
