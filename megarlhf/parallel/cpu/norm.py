"""RMSNorm for local layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SegmentNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism, which Megatron-Core's torch norm refuses.

    The mark on the weight tells Megatron-Core to sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma  # the factor is 1 + weight
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (no such attribute, to mypy)

    def forward(self, x: Tensor) -> Tensor:
        """x over its root mean square, times the weight."""
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)
