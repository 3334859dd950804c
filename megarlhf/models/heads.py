"""The critic's head: one value per token."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


def drawn_value_weights(hidden: int, seed: int) -> Tensor:
    """[1, hidden] float32: a new value head's weights, of standard deviation 1 / (hidden + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden, generator=generator) / (hidden + 1)


class ValueHead(MegatronModule):
    """Linear map from the hidden state to one number, in place of GPTModel's output layer.

    Whole on every tensor-parallel rank. Under sequence parallelism it gathers the sequence first: each rank sees all
    tokens and computes the same gradient, which then needs no reduction.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))

    def initialize(self, seed: int) -> None:
        """Draw the weights, equal on every rank and in every layout."""
        with torch.no_grad():
            self.weight.copy_(drawn_value_weights(self.weight.shape[1], seed))

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """[s / tp or s, 1, h] hidden states -> ([s, 1, 1] values, no bias), as ColumnParallelLinear returns them."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=parallel_state.get_tensor_model_parallel_group()
            )
        return torch.nn.functional.linear(hidden, self.weight), None
