"""A linear layer in FP8 on a CPU against float64, for each recipe: forward, input's gradient and weight's gradient."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.config.precision import PrecisionArguments
from megarlhf.models.fp8 import Fp8Layers
from megarlhf.parallel.cpu.layers import WholeLinear
from tests.distributed.layouts import SINGLE, world
from tests.distributed.pool import RankPool
from tests.fp8_oracle import LARGEST, at_scale, by_blocks

TOKENS, INPUTS, OUTPUTS = 140, 136, 132  # blocks of 128 and smaller ones in every direction
MICRO_BATCHES = 3


class Decoder(torch.nn.Module):
    """One linear layer, as Megatron-Core's block of layers holds it."""

    def __init__(self, linear: WholeLinear) -> None:
        super().__init__()
        layer: Any = torch.nn.Module()
        layer.linear, layer.layer_number = linear, 1
        self.layers = torch.nn.ModuleList([layer])

    def forward(self, hidden: Tensor) -> Tensor:
        layer: Any = self.layers[0]
        output: Tensor = layer.linear(hidden)[0]
        return output


def numbers() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A weight, and an input with a gradient of the output for each micro-batch, of very different sizes."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(OUTPUTS, INPUTS, generator=draw) * 0.05
    pairs = []
    for size in (1.0, 30.0, 0.01)[:MICRO_BATCHES]:
        x = torch.randn(TOKENS, 1, INPUTS, generator=draw) * size * torch.logspace(-2, 1, INPUTS)
        pairs.append((x, torch.randn(TOKENS, 1, OUTPUTS, generator=draw) * size * 1e-4))
    return weight, pairs


Found = list[tuple[Tensor, Tensor, Tensor]]


def emulated(rank: int, world_size: int, init_method: str, options: PrecisionArguments) -> tuple[Found, Any]:
    """Output and both gradients of each micro-batch, and the statistics of all."""
    weight, pairs = numbers()
    with world(SINGLE, rank, init_method):
        ends = {"first_last_layers_bf16": False, "num_layers": 1}
        config: Any = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False, num_moe_experts=None, **ends)
        linear = WholeLinear(config, INPUTS, OUTPUTS)
        linear.weight.data.copy_(weight)
        decoder = Decoder(linear)
        layers = Fp8Layers([SimpleNamespace(decoder=decoder, config=config)], options)
        layers.on = layers.trains = True
        found = []
        for x, gradient in pairs:
            linear.weight.grad, x = None, x.requires_grad_()
            output = decoder(x)
            output.backward(gradient)
            assert x.grad is not None and linear.weight.grad is not None
            found.append((output.detach(), x.grad, linear.weight.grad))
        return found, layers.take_statistics()


def expected(options: PrecisionArguments) -> Found:
    """The same in float64, by the oracle's own rounding."""
    weight, pairs = numbers()
    form = "e5m2" if options.fp8_format == "hybrid" else "e4m3"
    history: list[tuple[float, float, float]] = []  # of delayed scaling: input, weight, gradient
    found = []
    for x, gradient in pairs:
        x, g = x.view(TOKENS, INPUTS), gradient.view(TOKENS, OUTPUTS)
        if options.fp8_recipe == "blockwise":
            w = by_blocks(weight, "e4m3", 128, 128)
            output = by_blocks(x, "e4m3", 1, 128) @ w.t()
            dgrad = by_blocks(g, form, 1, 128) @ w
            wgrad = by_blocks(g, form, 128, 1).t() @ by_blocks(x, "e4m3", 128, 1)
        else:
            amaxes = tuple(float(operand.abs().max()) for operand in (x, weight, g))
            used = amaxes
            if options.fp8_recipe == "delayed":
                kept = history[-options.fp8_amax_history_len :]
                latest = kept[-1:] if options.fp8_amax_compute_algo == "most_recent" else kept
                used = tuple(max(entry[i] for entry in latest) if latest else math.nan for i in range(3))
            history.append(amaxes)
            forms = ("e4m3", "e4m3", form)
            limits = [LARGEST[each] for each in forms]
            scales = [1.0 if math.isnan(amax) else _divided(top, amax) for top, amax in zip(limits, used, strict=True)]
            x8, w8, g8 = (at_scale(v, s, f) for v, s, f in zip((x, weight, g), scales, forms, strict=True))
            output, dgrad, wgrad = x8 @ w8.t(), g8 @ w8, g8.t() @ x8
        found.append((output.view(TOKENS, 1, -1), dgrad.view(TOKENS, 1, -1), wgrad))
    return found


def _divided(a: float, b: float) -> float:
    """float32's quotient."""
    return float(torch.tensor(a) / torch.tensor(b))


RECIPES = {
    "tensorwise-hybrid": PrecisionArguments(fp8_recipe="tensorwise"),
    "tensorwise-e4m3": PrecisionArguments(fp8_recipe="tensorwise", fp8_format="e4m3"),
    "delayed-latest": PrecisionArguments(fp8_recipe="delayed"),
    "delayed-max-of-2": PrecisionArguments(
        fp8_recipe="delayed", fp8_amax_history_len=2, fp8_amax_compute_algo="max", fp8_format="e4m3"
    ),
    "blockwise-e4m3": PrecisionArguments(fp8_recipe="blockwise", fp8_format="e4m3"),
    "blockwise-hybrid": PrecisionArguments(fp8_recipe="blockwise"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_against_float64(ranks: RankPool, recipe: str) -> None:
    """Seconds: every number is looked up."""
    options = RECIPES[recipe]
    ((found, statistics),) = ranks.run(1, emulated, options)
    for number, (one, other) in enumerate(zip(found, expected(options), strict=True)):
        for what, emulation, oracle in zip(("output", "dgrad", "wgrad"), one, other, strict=True):
            error = (emulation - oracle).abs().max() / oracle.abs().max().clamp(min=1e-30)  # e4m3 at first: all 0
            assert error < 2e-6, f"{what} of micro-batch {number} is {error:.2e} off"
    _, pairs = numbers()
    assert statistics.amax == max(float(x.abs().max()) for x, _ in pairs)
    assert statistics.total == MICRO_BATCHES * (TOKENS * (INPUTS + OUTPUTS) + INPUTS * OUTPUTS)
    assert statistics.nonfinite == 0
    assert (statistics.saturated > 0) == (options.fp8_recipe == "delayed"), "the second input is 30 times the first"
