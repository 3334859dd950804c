"""From outcome rewards and per-token KL to per-token advantages: GAE, REINFORCE and the group baselines.

Ragged: the tokens of all responses lie behind one another in tensors [t], and `lengths` [b] int64 says how many each
response has, at least 1. Nothing here holds a gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megarlhf.algos.whitening import whiten

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


@torch.no_grad()
def token_rewards(
    kl: Tensor | None, rewards: Tensor, lengths: Tensor, *, kl_coef: float, clip_range: tuple[float, float] | None
) -> Tensor:
    """Reward of each token: -kl_coef * kl, and on the last token the outcome reward on top.

    arXiv:1909.08593 equation 2, its KL spread over the tokens; only the outcome is clamped.

    Args:
        kl: [t] float, nats; None for no penalty.
        rewards: [b] float32, one outcome reward per sample.
        kl_coef: weight of the penalty; at 0 `kl` is not looked at.
        clip_range: lowest and highest outcome; None leaves the outcomes as they are.
    Returns:
        New tensor [t], dtype of `rewards`.
    Raises:
        ValueError: an empty response, or a kl of another length than the responses.
    """
    _check_lengths(lengths)
    if kl is None or kl_coef == 0:
        tokens = rewards.new_zeros(int(lengths.sum()))
    else:
        _check_tokens("kl", kl, lengths)
        tokens = (-kl_coef * kl).to(rewards.dtype)
    tokens[lengths.cumsum(0) - 1] += rewards if clip_range is None else rewards.clamp(*clip_range)
    return tokens


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimate of each response: A_t = sum_l (gamma * lambd)^l * delta_{t+l}.

    delta_t = r_t + gamma * V_{t+1} - V_t, with a V of 0 after the last token. arXiv:1506.02438 equation 16.

    Args:
        rewards: [t] float.
        values: [t] float, V of the state in which each token was chosen.
    Returns:
        advantages [t], and returns [t] = advantages + values, the critic's targets.
    Raises:
        ValueError: rewards or values do not have a number for each token.
    """
    _check_tokens("values", values, lengths)
    _check_tokens("rewards", rewards, lengths)
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    next_values[lengths.cumsum(0) - 1] = 0.0
    advantages = _discounted_sums_to_end(rewards + gamma * next_values - values, lengths, discount=gamma * lambd)
    return advantages, advantages + values


@torch.no_grad()
def discounted_returns(rewards: Tensor, lengths: Tensor, *, gamma: float) -> Tensor:
    """Return from each token to the end of its response: G_t = sum_k gamma^k * r_{t+k}.

    The weight of REINFORCE (Williams 1992, doi:10.1007/BF00992696) with reward-to-go.

    Args:
        rewards: [t] float.
    Returns:
        [t], dtype of `rewards`.
    """
    return _discounted_sums_to_end(rewards, lengths, discount=gamma)


def rloo_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Outcome less the mean outcome of the group's other samples: r_i - mean of r_j over j != i.

    REINFORCE leave-one-out, arXiv:2402.14740. The paper's outcome contains the sequence's KL; here, as in OpenRLHF, a
    KL in the reward comes after the baseline, token by token.

    Args:
        rewards: [b] float32, one outcome reward per sample.
        group_ids: [b] int64, equal for the samples of one prompt, in any order.
    Returns:
        [b] float32, zero mean within each group.
    Raises:
        ValueError: a group of one sample, which has no other to compare with.
    """
    group_of_sample, sizes = _groups(group_ids)
    own = rewards.double()
    group_sum = own.new_zeros(sizes.numel()).index_add(0, group_of_sample, own)[group_of_sample]  # [g] -> [b]
    return (own - (group_sum - own) / (sizes[group_of_sample] - 1)).to(rewards.dtype)


def group_mean_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Outcome less the mean outcome of its group: r_i - mean_g.

    The baseline of REINFORCE++-baseline, arXiv:2501.03262, which then whitens over the whole batch (the caller does).

    Args:
        rewards: [b] float32, one outcome reward per sample.
        group_ids: [b] int64, equal for the samples of one prompt, in any order.
    Returns:
        [b] float32, zero mean within each group.
    Raises:
        ValueError: a group of one sample, whose advantage is 0 and teaches nothing.
    """
    return _centre_in_groups(rewards, group_ids).to(rewards.dtype)


def group_relative_advantages(rewards: Tensor, group_ids: Tensor, *, divide_by_std: bool, eps: float) -> Tensor:
    """Advantage of each sample over its prompt's group: (r_i - mean_g) / (std_g + eps).

    GRPO, arXiv:2402.03300 section 4.1.2; divide_by_std=False is Dr. GRPO, arXiv:2503.20783. The paper does not say
    which std: this is the sample std (n - 1), as TRL and OpenRLHF take it.

    Args:
        rewards: [b] float32, one outcome reward per sample.
        group_ids: [b] int64, equal for the samples of one prompt, in any order.
        eps: added to the std, in reward units; unused without the division.
    Returns:
        [b] float32, zero mean within each group; the caller broadcasts it over response tokens.
    Raises:
        ValueError: a group of one sample, whose advantage is 0 and teaches nothing.
    """
    centred = _centre_in_groups(rewards, group_ids)
    if not divide_by_std:
        return centred.to(rewards.dtype)
    group_of_sample, sizes = _groups(group_ids)
    squares = centred.new_zeros(sizes.numel()).index_add(0, group_of_sample, centred.square())
    std = (squares / (sizes - 1)).sqrt()[group_of_sample]  # [g] -> [b]
    return (centred / (std + eps)).to(rewards.dtype)


def _no_baseline(rewards: Tensor, group_ids: Tensor) -> Tensor:
    return rewards


_OUTCOME_BASELINES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gae": _no_baseline,
    "reinforce": _no_baseline,
    "reinforce_baseline": group_mean_advantages,
    "rloo": rloo_advantages,
    "group_norm": partial(group_relative_advantages, divide_by_std=True, eps=GROUP_STD_EPS),
    "dr_grpo": partial(group_relative_advantages, divide_by_std=False, eps=GROUP_STD_EPS),
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
    Returns:
        Advantages and returns; without a critic the returns are the advantages before whitening.
    Raises:
        ValueError: an unknown estimator; values missing or not wanted; a reward that is not finite; a group of one
            sample where the baseline needs others; lengths that do not agree.
    """
    if estimator not in _OUTCOME_BASELINES:
        raise ValueError(f"advantage_estimator={estimator} is unknown: use one of {', '.join(_OUTCOME_BASELINES)}")
    if (estimator == "gae") != (values is not None):
        raise ValueError(
            f"advantage_estimator={estimator} {'without' if values is None else 'with'} critic values; gae is built on "
            "them and the others have no use for them: pass values for gae and None otherwise"
        )
    _check_lengths(lengths)
    for name, numbers in (("kl", kl), ("values", values)):
        if numbers is not None:
            _check_tokens(name, numbers, lengths)
    finite = rewards.isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"reward={float(rewards[~finite][0])} for {int((~finite).sum())} of {rewards.numel()} samples; rewards "
            "must be finite (one NaN would spread over the batch): drop samples without a result"
        )
    outcomes = _OUTCOME_BASELINES[estimator](rewards.clamp(*clip_range), group_ids)
    on_last_token = torch.zeros_like(outcomes) if estimator in _BROADCAST else outcomes
    pairs = []
    for samples, tokens in _blocks(lengths):
        sizes = lengths[samples]
        penalties = None if kl is None else kl[tokens]
        per_token = token_rewards(penalties, on_last_token[samples], sizes, kl_coef=kl_coef, clip_range=None)
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
        advantages = whiten(advantages, eps=WHITEN_EPS)
    return AdvantageResult(advantages=advantages, returns=returns)


def _blocks(lengths: Tensor) -> list[tuple[slice, slice]]:
    """Runs of samples and of their tokens, of about _BLOCK_TOKENS: what is computed of them on the way fits a cache."""
    ends = lengths.cumsum(0)
    cuts = [0, *(1 + (ends // _BLOCK_TOKENS).diff().nonzero()[:, 0]).tolist(), len(lengths)]
    bounds = [0, *ends.tolist()]
    runs = [(first, last) for first, last in zip(cuts[:-1], cuts[1:], strict=True) if first < last]
    return [(slice(first, last), slice(bounds[first], bounds[last])) for first, last in runs]


def _discounted_sums_to_end(terms: Tensor, lengths: Tensor, *, discount: float) -> Tensor:
    """S_t = terms_t + discount * S_{t+1} inside each response, summed in float64.

    Responses of similar length go side by side, cut into runs of _RUN tokens: a product with powers of the discount
    sums inside all runs at once, then each run takes over the sum of the one behind it.
    """
    rows = torch.split(terms, lengths.tolist())
    sums: list[Tensor] = [terms] * len(rows)
    order = lengths.argsort(descending=True).tolist()
    powers = discount ** torch.arange(_RUN + 1, dtype=torch.float64)
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
        found = runs.view(len(block), longest).to(terms.dtype)
        for place, row in zip(found, block, strict=True):
            sums[row] = place[longest - len(rows[row]) :]
    return torch.cat(sums)


def _check_lengths(lengths: Tensor) -> None:
    if bool((lengths < 1).any()):
        sample = int((lengths < 1).nonzero()[0])
        raise ValueError(f"response_length=0 for sample {sample}; its reward has no token to sit on: drop it")


def _check_tokens(name: str, tokens: Tensor, lengths: Tensor) -> None:
    if tokens.shape != (int(lengths.sum()),):
        raise ValueError(f"{name} has shape {tuple(tokens.shape)} for {int(lengths.sum())} response tokens")


def _groups(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Dense group number of each sample [b], and the samples in each group [g]; a group of one raises."""
    ids, group_of_sample, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if bool((sizes < 2).any()):
        raise ValueError(
            f"group_id={int(ids[sizes < 2][0])} has 1 sample; a group baseline needs at least 2 (alone, its advantage "
            "is 0 or undefined): set n_samples_per_prompt to 2 or more, and drop groups that lost their other samples"
        )
    return group_of_sample, sizes


def _centre_in_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """r_i - mean_g as [b] float64."""
    group_of_sample, sizes = _groups(group_ids)
    own = rewards.double()
    means = own.new_zeros(sizes.numel()).index_add(0, group_of_sample, own) / sizes  # [g]
    return own - means[group_of_sample]
