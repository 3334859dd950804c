"""Losses of models that judge: pairs of answers by one value each, and steps of a solution by a token each."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
    """-log sigmoid(r_c - r_r - m) of each pair: Bradley-Terry, with a margin as in arXiv:2307.09288 equation 2.

    LogExp, log(1 + exp(r_r - r_c + m)), is the same number; computed as it is written it overflows.

    Args:
        chosen, rejected: [pairs] float, rewards.
        margin: [pairs] float in units of the reward, no gradient; None for 0.
    Returns:
        [pairs] loss.
    """
    return -logsigmoid(chosen - rejected if margin is None else chosen - rejected - margin)


def step_loss(log_probs: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy -sum_i share_i * log p_i of each step's label over the reward tokens.

    Hard labels of Math-Shepherd, arXiv:2312.08935 section 3.3, have one share of 1; soft ones are its estimated
    probabilities.

    Args:
        log_probs: [n, k] float, log p of each reward token among the reward tokens.
        shares: [n, k] float, the label's probability of each, no gradient.
    Returns:
        loss [n], and correct [n] bool: the label's likeliest reward token, the first of several, is the model's.
    """
    return -(shares * log_probs).sum(-1), log_probs.argmax(-1) == shares.argmax(-1)
