"""DeepSeek-V3's expert bias: training leaves it alone, and it keeps its float32 beside bfloat16 weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarlhf.engine.export import export_hf
from megarlhf.trainers.parity_cases import (
    parity_case,
)
from tests.distributed.cases import make_rows
from tests.distributed.layouts import LATENT_LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

BIAS = "e_score_correction_bias"


def train_and_export(
    rank: int, world_size: int, init_method: str, layout: Layout, source: Path, target: Path
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The biases that this rank's routers compute with after a step, and on rank 0 those that a stream brings."""
    with world(layout, rank, init_method):
        engine = build(layout, source)
        engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0)
        export_hf(engine, target)
        live = [b.clone() for chunk in engine.chunks for name, b in chunk.named_buffers() if "expert_bias" in name]
        return live, {name: t.clone() for name, t in engine.weights.iter_hf_weights() if name.endswith(BIAS)}


@pytest.mark.parametrize("name", ["TP1", "PP2", "EP2"])
def test_a_step_in_bfloat16_changes_no_bit_of_the_bias(ranks: RankPool, tmp_path: Path, name: str) -> None:
    layout = replace({"TP1": SINGLE, **LATENT_LAYOUTS}[name], bf16=True)
    source = make_model(tmp_path / "model", family="deepseek-v3")
    stored = load_file(source / "model.safetensors")
    stored = {k: t if k.endswith(BIAS) else t.bfloat16() for k, t in stored.items()}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    biases = {k: t for k, t in stored.items() if k.endswith(BIAS)}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in biases.values()), "bfloat16 would round it"
    results = ranks.run(layout.world_size, train_and_export, layout, source, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for key, bias in biases.items():
        assert torch.equal(exported[key], bias)
        assert torch.equal(results[0][1][key], bias)
    live = [bias for biases_of_rank, _ in results for bias in biases_of_rank]
    assert len(live) == len(biases) * layout.world_size // layout.pipeline
    assert all(any(torch.equal(found, bias) for bias in biases.values()) for found in live)
    assert {t.dtype for k, t in exported.items() if k not in biases} == {torch.bfloat16}
