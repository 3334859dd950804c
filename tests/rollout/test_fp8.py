"""An engine whose linear weights are rounded to FP8 at each sync, against Transformers with weights rounded alike.

Importing vLLM and loading an engine takes about 10 seconds, a second one in the same process 2.
"""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megarlhf.rollout import weight_sources
from megarlhf.rollout.engine import RolloutEngine
from tests.fp8_oracle import at_scale
from tests.rollout.models import SharedModel, answers, make_engine_model, make_prompts, perturbed
from tests.rollout.test_engine import OPTIONS, worst_difference

PROMPTS = make_prompts([5, 40, 70])
Quantization = Literal["fp8_per_tensor", "fp8_per_block"]


def start(model_dir: Path, quantization: Quantization | None) -> RolloutEngine:
    sizes: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 16, "kv_cache_gib": 0.1, "threads": 1}
    return RolloutEngine(model_dir, dtype="float32", quantization=quantization, seed=0, **sizes)


def fp8(weight: Tensor, block: int | None) -> Tensor:
    """A scale for the whole matrix, or each block of so many rows and columns."""
    size = block or max(weight.shape)
    for top in range(0, weight.shape[0], size):
        for left in range(0, weight.shape[1], size):
            part = weight[top : top + size, left : left + size]
            part.copy_(at_scale(part, float(torch.tensor(448.0) / part.abs().max()), "e4m3"))
    return weight


@torch.no_grad()
def rounded(model: PreTrainedModel, block: int | None) -> PreTrainedModel:
    """With what vLLM fuses rounded together; embedding, head and norms as they are."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for fused in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ):
            whole = fp8(torch.cat([part.weight for part in fused]), block)
            for part, rows in zip(fused, whole.split([len(part.weight) for part in fused]), strict=True):
                part.weight.copy_(rows)
    return model


@pytest.mark.parametrize("way", ["direct", "loader"])
@pytest.mark.parametrize(("quantization", "block"), [("fp8_per_tensor", None), ("fp8_per_block", 128)])
def test_weights_are_rounded_at_each_update(
    tmp_path: Path, quantization: Quantization, block: int | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "loader":
        monkeypatch.setattr(weight_sources, "plan_direct_update", lambda model, tensors: None)
    model_dir = make_engine_model(tmp_path)
    engine = start(model_dir, quantization)
    try:
        for version in (1, 2):
            model = perturbed(model_dir, seed=version)
            shared = SharedModel(model)
            engine.connect_weights(shared.blocks)
            sent = shared.checksum()
            reported = engine.update_weights(version, sent)
            assert (reported["checksum"], reported["applied"]) == (sent, way), "of what the trainer has, unrounded"
            samples = answers(engine.generate(PROMPTS, **OPTIONS))
            assert worst_difference(model, samples) > 1e-2
            assert worst_difference(rounded(model, block), samples) < 1e-4
            again = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
            assert worst_difference(again, samples) > 1e-2
    finally:
        engine.close()


def test_an_engine_leaves_fp8_by_a_restart(tmp_path: Path) -> None:
    """In the same process, connected to the same memory, which rounding has left alone."""
    model_dir = make_engine_model(tmp_path)
    model = perturbed(model_dir, seed=3)
    shared = SharedModel(model)
    for quantization, expected in (("fp8_per_tensor", False), (None, True), ("fp8_per_block", False)):
        engine = start(model_dir, quantization)  # type: ignore[arg-type]
        engine.connect_weights(shared.blocks)
        engine.update_weights(4, shared.checksum())
        assert (worst_difference(model, answers(engine.generate(PROMPTS, **OPTIONS))) < 1e-4) == expected
        engine.close()
