"""Knowledge distillation: the loss of a student beside its teacher."""

from typing import Literal

from torch import Tensor


def distillation_loss(
    log_probs: Tensor,
    divergence: Tensor,
    teacher_entropy: Tensor,
    *,
    kd_coef: float,
    direction: Literal["forward", "reverse"],
) -> Tensor:
    """(1 - kd_coef) * -log p(target) + kd_coef * distillation, of each token.

    Distillation is, forward, the cross-entropy -sum p_T log p_S, which is KL(T || S) plus the teacher's entropy, as in
    Hinton et al., arXiv:1503.02531 (temperature 1), and OpenRLHF; reverse, KL(S || T), as in MiniLLM, arXiv:2306.08543,
    but on the data's tokens instead of the student's own.

    Args:
        log_probs: [n] of the targets under the student.
        divergence: [n] nats, KL in that direction.
        teacher_entropy: [n] nats; it has no gradient.
    Returns:
        [n] nats.
    """
    distilled = divergence + teacher_entropy if direction == "forward" else divergence
    return kd_coef * distilled - (1.0 - kd_coef) * log_probs


def bucket_divergence(
    log_probs: Tensor, teacher_log_probs: Tensor, *, direction: Literal["forward", "reverse"]
) -> tuple[Tensor, Tensor]:
    """KL between distributions over a teacher's k likeliest tokens and one bucket of all others; the teacher's entropy.

    By the log-sum inequality at most the KL over the whole vocabulary, and 0 where the student gives these tokens the
    teacher's probabilities. Without the bucket, over the k tokens alone, a student would be driven to say nothing else,
    or could say anything else.

    Args:
        log_probs, teacher_log_probs: [n, k + 1], finite; the last is the bucket's.
    Returns:
        [n] nats, [n] nats.
    """
    first, second = (teacher_log_probs, log_probs) if direction == "forward" else (log_probs, teacher_log_probs)
    divergence = (first.exp() * (first - second)).sum(-1)
    return divergence, -(teacher_log_probs.exp() * teacher_log_probs).sum(-1)
