"""FP8 on a CPU: linear layers whose operands are rounded as TransformerEngine's recipes round them on a GPU.

The input and the weight of a layer's product and the gradients of its output are E4M3, the latter E5M2 in the hybrid
format, multiplied and summed in float32; embedding, norms, attention, routers and the output layer are as they are.

- tensorwise: a scale a tensor, from its largest number. Of what a rank holds: a cut weight, and activations that
  tensor parallelism cuts by their features, have a scale on each rank, as with TransformerEngine.
- delayed: a scale a tensor, from the largest numbers of earlier micro-batches, which are the largest of all ranks that
  share the layer. Scales move on after each micro-batch's forward pass in training, and after its backward pass.
- blockwise: scales that are powers of two, of 128x128 of a weight, and of 128 numbers of a token's activations or
  gradients; where the gradient of the weight is computed, of 128 tokens of a feature instead.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megarlhf.algos.fp8 import (
    BLOCK,
    FP8_MAX,
    gradient_dtype,
    largest,
    num_saturated,
    rounded,
    rounded_blocks,
    scale_of,
    with_new_amax,
)
from megarlhf.config.precision import PrecisionArguments
from megarlhf.parallel.cpu.layers import WholeLinear

_E4M3 = torch.float8_e4m3fn
_INPUT, _WEIGHT, _GRADIENT = range(3)  # the operands of a layer


@dataclass
class Statistics:
    """What was rounded since the last look, on this rank."""

    amax: float = 0.0  # largest finite |number|
    nonfinite: int = 0  # tensors that held NaN or infinity
    saturated: int = 0  # numbers beyond FP8's largest at their scale
    total: int = 0  # numbers that were rounded

    def add(self, amax: float, saturated: int, total: int) -> None:
        """One tensor."""
        finite = amax < torch.inf
        self.amax, self.nonfinite = max(self.amax, amax if finite else 0.0), self.nonfinite + (not finite)
        self.saturated, self.total = self.saturated + saturated, self.total + total


@dataclass
class Chunk:
    """The FP8 linear layers of one chunk of the model, and delayed scaling's state of them."""

    layers: list["Fp8Linear"]
    history: Tensor  # [length, layers, 3], largest numbers of each operand; see with_new_amax
    scale: Tensor  # [layers, 3]
    in_forward: bool = False  # a forward pass in training has rounded, and scales have not moved on yet
    in_backward: bool = False


@dataclass
class Scales:
    """Scales of a layer's input and weight in one forward pass; None: blocks have their own."""

    operands: tuple[Tensor, Tensor] | None = None


@dataclass
class Fp8Linear:
    """What takes the place of a linear layer's product."""

    owner: "Fp8Layers"
    name: str  # the same in every layout
    chunk: Chunk
    index: int  # in the chunk
    module: Any  # Megatron-Core's layer
    plain: Any  # and its product
    kept: deque[Scales] = field(default_factory=deque)  # of forward passes that are to be computed again

    def product(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        **others: Any,
    ) -> Tensor:
        """[t, b, in] and [out, in] of this rank -> [t, b, out], in the place of `_forward_impl`."""
        if not self.owner.on:
            given = {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel, "tp_group": tp_group}
            return self.plain(input, weight, bias=bias, **given, **others)
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        scales = self.scales(input.detach(), weight.detach())
        output = Fp8Product.apply(input, weight, self, scales)
        return output if bias is None else output + bias

    def scales(self, x: Tensor, weight: Tensor) -> Scales:
        """Of a forward pass; one that is computed again in the backward pass has those that it had."""
        if self.kept and torch.is_grad_enabled():
            return self.kept.popleft()
        operands = [self.scale(operand, which) for which, operand in enumerate((x, weight))]
        found = Scales() if self.owner.blocks else Scales((operands[_INPUT], operands[_WEIGHT]))
        self.chunk.in_forward |= self.owner.trains
        if self.owner.trains and not torch.is_grad_enabled():  # inside a checkpoint: recompute_granularity=full
            self.kept.append(found)
        return found

    def scale(self, x: Tensor, which: int) -> Tensor:
        """The scale of one operand, which is counted, and noted where scales are delayed."""
        owner, amax, saturated = self.owner, largest(x), 0
        dtype = _E4M3 if which != _GRADIENT else owner.gradient_dtype
        if owner.delayed:
            scale = self.chunk.scale[self.index, which].clone()
            if owner.trains:
                newest = self.chunk.history[0, self.index, which]
                newest.copy_(torch.maximum(newest, amax))
            if amax * scale > FP8_MAX[dtype]:
                saturated = num_saturated(x, scale, dtype)
        else:
            scale = scale_of(amax, dtype)
        owner.statistics.add(float(amax), saturated, x.numel())
        return scale


class Fp8Product(torch.autograd.Function):
    """x W^T with rounded operands, and the gradients of both with a rounded gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, linear: Fp8Linear, scales: Scales) -> Tensor:
        """Keeps the operands unrounded: most are kept by what is around anyway."""
        x, weight = input.detach().reshape(-1, input.shape[-1]), weight.detach()
        ctx.linear, ctx.scales, ctx.shape = linear, scales, input.shape
        ctx.save_for_backward(x, weight)
        x_rounded = _rounded(x, _E4M3, ctx.scales.operands, _INPUT, (1, BLOCK))
        product = x_rounded @ _rounded(weight, _E4M3, ctx.scales.operands, _WEIGHT, (BLOCK, BLOCK)).t()
        return product.to(input.dtype).view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """For the input and the weight."""
        (x, weight), linear, operands = ctx.saved_tensors, ctx.linear, ctx.scales.operands
        owner, (gradient,) = linear.owner, gradients
        g, dtype = gradient.reshape(-1, gradient.shape[-1]), owner.gradient_dtype
        scale, for_input, for_weight = linear.scale(g, _GRADIENT), None, None
        linear.chunk.in_backward = True
        own = None if owner.blocks else (scale,)
        if ctx.needs_input_grad[0]:
            w_rounded = _rounded(weight, _E4M3, operands, _WEIGHT, (BLOCK, BLOCK))
            for_input = (_rounded(g, dtype, own, 0, (1, BLOCK)) @ w_rounded).to(gradient.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            x_rounded = _rounded(x, _E4M3, operands, _INPUT, (BLOCK, 1))
            for_weight = (_rounded(g, dtype, own, 0, (BLOCK, 1)).t() @ x_rounded).to(weight.dtype)
        return for_input, for_weight, None, None


def _rounded(
    x: Tensor, dtype: torch.dtype, scales: tuple[Tensor, ...] | None, which: int, block: tuple[int, int]
) -> Tensor:
    if scales is None:
        return rounded_blocks(x, dtype, rows=block[0], columns=block[1])
    return rounded(x, scales[which], dtype)


class Fp8Layers:
    """The linear layers of a model's decoder that compute in FP8 while `on` is set, else as they are.

    Attributes:
        trains: the pass has gradients, or is the forward half of one that has.
        statistics: of this rank, until someone takes them.
    """

    def __init__(self, chunks: Sequence[Any], options: PrecisionArguments) -> None:
        self.on, self.trains, self.statistics = False, False, Statistics()
        self.delayed, self.blocks = options.fp8_recipe == "delayed", options.fp8_recipe == "blockwise"
        self.gradient_dtype = gradient_dtype(options.fp8_format)
        self._algorithm, self._chunks = options.fp8_amax_compute_algo, list[Chunk]()
        for chunk in chunks:
            found = _linear_layers(chunk)
            shape = (len(found), 3)
            state = Chunk([], torch.zeros(options.fp8_amax_history_len, *shape), torch.ones(shape))
            for name, module in found:
                linear = Fp8Linear(self, name, state, len(state.layers), module, module._forward_impl)
                module._forward_impl = linear.product
                state.layers.append(linear)
            if self.delayed:
                chunk.decoder.register_forward_hook(partial(self._after_forward, state))
            self._chunks.append(state)

    def take_statistics(self) -> Statistics:
        """Those since the last call; with them a pass is over, so that delayed scales of gradients move on too."""
        for chunk in self._chunks:
            self._after_backward(chunk)
            for linear in chunk.layers:
                linear.kept.clear()
        found, self.statistics = self.statistics, Statistics()
        return found

    def state(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Delayed scaling's history and scales by the layer's name, of all ranks, all of which call it."""
        if not self.delayed:
            return {}
        own = {
            linear.name: (chunk.history[:, linear.index].clone(), chunk.scale[linear.index].clone())
            for chunk in self._chunks
            for linear in chunk.layers
        }
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        return {name: numbers for part in parts for name, numbers in part.items()}

    def load_state(self, state: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Continue from `state` of any layout; a history of another length gives its latest numbers."""
        for chunk in self._chunks:
            for linear in chunk.layers:
                history, scale = state[linear.name]
                size = min(len(history), len(chunk.history)) - 1
                chunk.history[:, linear.index] = 0.0
                if size:
                    chunk.history[-size:, linear.index] = history[-size:]
                chunk.scale[linear.index] = scale

    def settle(self) -> None:
        """After a pass that went wrong: the finite ones of its largest numbers count for the next scales."""
        self.take_statistics()
        for chunk in self._chunks:
            chunk.history.nan_to_num_(nan=0.0, posinf=0.0)

    @torch.no_grad()
    def round_weights(self) -> None:
        """Let the layers' weights be what FP8 holds of them."""
        for chunk in self._chunks:
            for linear in chunk.layers:
                weight = linear.module.weight.data
                own = chunk.scale[linear.index, _WEIGHT] if self.delayed else scale_of(largest(weight), _E4M3)
                scales = None if self.blocks else (own,)
                weight.copy_(_rounded(weight, _E4M3, scales, 0, (BLOCK, BLOCK)))

    def _after_forward(self, chunk: Chunk, _: Any, inputs: Any, output: Tensor) -> None:
        """Hook of a chunk's layers: the scales of the next forward pass, and a place to begin the backward pass."""
        if not (self.on and self.trains and chunk.in_forward):
            return
        self._move_on(chunk, slice(_INPUT, _WEIGHT + 1), _E4M3)
        chunk.in_forward = False
        if output.requires_grad:
            output.register_hook(lambda _: self._after_backward(chunk))

    def _after_backward(self, chunk: Chunk) -> None:
        """The scales of gradients, when the next micro-batch's begins or the pass is over."""
        if chunk.in_backward and self.delayed:
            self._move_on(chunk, slice(_GRADIENT, _GRADIENT + 1), self.gradient_dtype)
        chunk.in_backward = False

    def _move_on(self, chunk: Chunk, operands: slice, dtype: torch.dtype) -> None:
        history, scale = chunk.history[..., operands], chunk.scale[:, operands]
        newest = history[0].contiguous()
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        dist.all_reduce(newest, op=dist.ReduceOp.MAX, group=group)
        history[0] = newest
        scale.copy_(with_new_amax(history, scale, dtype, self._algorithm))


def _linear_layers(chunk: Any) -> list[tuple[str, Any]]:
    """The decoder's linear layers that are not left in bf16, under names with the layer's and the expert's number."""
    experts, found = parallel_state.get_expert_model_parallel_rank(), list[tuple[str, Any]]()
    for layer in chunk.decoder.layers:
        if is_first_last_bf16_layer(chunk.config, layer.layer_number - 1):
            continue
        for name, module in layer.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear | WholeLinear):
                before, local, after = name.partition("local_experts.")
                if local:
                    number, _, after = after.partition(".")
                    per_rank = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
                    after = f"{experts * per_rank + int(number)}.{after}"
                found.append((f"{layer.layer_number - 1}.{before}{local}{after}", module))
    return found
