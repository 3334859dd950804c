"""Weights of a CPU's engine as FP8 holds them: its build of vLLM has no kernels of FP8."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear

from megarlhf.algos.fp8 import BLOCK, largest, rounded, rounded_blocks, scale_of

ROUNDS = "megarlhf_rounds_weights"  # key of vLLM's additional_config: fp8_per_tensor or fp8_per_block
_FP8 = torch.float8_e4m3fn


def round_linear_weights(model: nn.Module, quantization: str) -> None:
    """From the next load on let linear layers and experts of a CPU compute with what FP8 holds of their weights.

    As vLLM's online quantization on GPUs: a scale for each layer, of q, k, v and of gate, up together, or for each
    block of 128x128, and for each expert. Output heads and routers stay as they are, as do activations, other than
    there.
    """

    def rounded_part(layer: Any, weight: Tensor) -> Tensor:
        if quantization == "fp8_per_block":
            return rounded_blocks(weight, _FP8, rows=BLOCK, columns=BLOCK, power_of_two=False).to(weight.dtype)
        amax = largest(weight).reshape(1)
        if getattr(layer, "tp_size", 1) > 1 and isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=get_tp_group().device_group)
        return rounded(weight, scale_of(amax, _FP8), _FP8).to(weight.dtype)

    def round_before(method: Any, names: Sequence[str]) -> None:
        process = method.process_weights_after_loading

        def process_rounded(layer: Any) -> None:
            for name in names:
                weight = getattr(layer, name)
                parts = [weight.data] if weight.dim() == 2 else list(weight.data)  # of each expert its own
                whole = torch.stack([rounded_part(layer, part) for part in parts])
                weight.data = whole[0] if weight.dim() == 2 else whole
            process(layer)

        method.process_weights_after_loading = process_rounded

    for name, module in model.named_modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(module, LinearBase) and not name.endswith("gate"):  # a router
            round_before(method, ("weight",))
        elif isinstance(method, UnquantizedFusedMoEMethod):
            round_before(method, ("w13_weight", "w2_weight"))
