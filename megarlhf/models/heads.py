"""What takes the place of GPTModel's output layer: the language model's head, and the critic's, one value per token."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


def drawn_value_weights(hidden: int, seed: int) -> Tensor:
    """[1, hidden] float32: a new value head's weights, of standard deviation 1 / (hidden + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden, generator=generator) / (hidden + 1)


class LMHead(ColumnParallelLinear):
    """An output layer that hands on hidden states, so that no whole logits exist: parallel/vocab.py has the product.

    It has the weights of the layer whose place it takes, with all that Megatron-Core has set on them, and saves them
    as that layer does. Tied, on a stage that has the embedding, it has none (`output_weight`).
    """

    def __init__(self, layer: ColumnParallelLinear) -> None:
        super().__init__(
            layer.input_size,
            layer.output_size,
            config=layer.config,
            init_method=layer.config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=layer.tp_group,
        )
        if layer.weight is not None:
            self.weight = layer.weight

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[s / tp or s, 1, h] hidden states -> ([s, 1, h] of all tokens, no bias), whose gradient is summed over TP."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=self.tp_group), None
        return with_new_strides(copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)), None


def with_new_strides(hidden: Tensor) -> Tensor:
    """The same [s, 1, h] with the strides of a new tensor, (h, h, 1), as its gradient then has.

    GPTModel's transpositions of [1, s, h] leave (h, s * h, 1), with which matmul multiplies by a frozen weight token by
    token: 8 times as long on a CPU.
    """
    return hidden.flatten(0, 1)[:, None]


def output_weight(model: Any) -> Tensor:
    """[padded_vocab / tp, h]: the weights of an LMHead's product, the embedding's where it has none of its own."""
    weight: Tensor | None = model.output_layer.weight
    return model.shared_embedding_or_output_weight() if weight is None else weight


def frozen_output_weight(model: Any, *, num_rows: int) -> Tensor:
    """[num_rows, h] copy of an output layer's weights for the tokens of this rank's shard of another model.

    Vocabularies of one tokenizer may be padded to different sizes, so that ranks begin at different tokens; all ranks
    of the tensor-parallel group call it.

    Args:
        num_rows: of each rank's shard of the other model, which has no more tokens than this one.
    """
    weight, group = output_weight(model).detach(), parallel_state.get_tensor_model_parallel_group()
    if len(weight) != num_rows:
        shards = [torch.empty_like(weight) for _ in range(group.size())]
        torch.distributed.all_gather(shards, weight.contiguous(), group=group)
        first = group.rank() * num_rows
        weight = torch.cat(shards)[first : first + num_rows]
    return weight.clone()


class ValueHead(MegatronModule):
    """Linear map from the hidden state to one number, less a mean and over a std, in place of GPTModel's output layer.

    Whole on every tensor-parallel rank and drawn alike in every layout. Under sequence parallelism it gathers the
    sequence first: each rank sees all tokens and computes the same gradient, which then needs no reduction.
    """

    def __init__(self, config: Any, seed: int, moments: tuple[float, float]) -> None:
        super().__init__(config=config)
        self.moments = moments
        self.weight = torch.nn.Parameter(drawn_value_weights(config.hidden_size, seed).to(config.params_dtype))

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """[s / tp or s, 1, h] hidden states -> ([s, 1, 1] values, no bias), as ColumnParallelLinear returns them."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=parallel_state.get_tensor_model_parallel_group()
            )
        mean, std = self.moments
        return (torch.nn.functional.linear(hidden, self.weight) - mean) / std, None
