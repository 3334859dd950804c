"""Losses of preferences: DPO, cDPO and IPO of pairs of answers, KTO of single answers with a label.

They compare log-ratios: the log-prob of a whole answer under the policy minus that under the reference, summed over its
tokens. A loss here is one number a pair or an answer; the caller sums, and divides by one denominator of the global
batch.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float, ipo: bool) -> Tensor:
    """-(1 - s) * log sigmoid(beta * h) - s * log sigmoid(-beta * h), h = chosen - rejected, s = label_smoothing.

    DPO, arXiv:2305.18290 equation 7; s above 0 is conservative DPO, for labels that are wrong with probability s. With
    `ipo` it is (h - 1 / (2 * beta))^2, arXiv:2310.12036 equation 17, where beta is the paper's tau. As in OpenRLHF h is
    of summed log-probs there too; TRL's IPO divides each answer's by its tokens, so that another beta fits.

    Args:
        chosen, rejected: [p] float, log-ratios of the answers of each pair.
        label_smoothing: in [0, 0.5), and 0 with `ipo`.
    Returns:
        [p].
    """
    assert not (ipo and label_smoothing), "IPO has no label smoothing"
    difference = chosen - rejected
    if ipo:
        return (difference - 1 / (2 * beta)).square()
    logits = beta * difference
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_loss_weight: float,
    undesirable_loss_weight: float,
) -> Tensor:
    """weight * (1 - sigmoid(+-beta * (log_ratio - kl))), + for desirable answers and - for the others.

    KTO, arXiv:2402.01306 equation 8 without its constant.

    Args:
        log_ratios: [n] float.
        desirable: [n] bool.
        kl: [] or [n] float, the reference point: at least 0, no gradient.
    Returns:
        [n].
    """
    wanted = desirable.to(log_ratios)
    weights = desirable_loss_weight * wanted + undesirable_loss_weight * (1 - wanted)
    return weights * torch.sigmoid((1 - 2 * wanted) * beta * (log_ratios - kl))
