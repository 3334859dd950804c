"""Mistakes in checkpoint files that their headers tell."""

import json
from pathlib import Path

import pytest

from megarlhf.formats.huggingface import HFWeights
from tests.distributed.layouts import SINGLE, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model


def test_index_that_leaves_out_a_tensor(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", family="llama")
    whole = dict.fromkeys(HFWeights(model_dir).names(), "model.safetensors")
    index = model_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": whole}))
    assert HFWeights(model_dir).names() == sorted(whole)
    index.write_text(json.dumps({"weight_map": {n: f for n, f in whole.items() if n != "model.norm.weight"}}))
    with pytest.raises(ValueError, match=r"leaves out tensors that its files hold: \['model.norm.weight'\]"):
        HFWeights(model_dir)


def start_critic(rank: int, world_size: int, init_method: str, model_dir: Path) -> str:
    """What building a critic raises."""
    with world(SINGLE, rank, init_method):
        try:
            build(SINGLE, model_dir, head="value")
        except ValueError as error:
            return str(error)
    return ""


def test_a_classifier_brings_its_head(ranks: RankPool, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", family="llama")
    assert ranks.run(1, start_critic, model_dir) == [""], "a causal model's head is drawn"
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (model_dir / "config.json").write_text(json.dumps(config))
    assert "missing ['score.weight']" in ranks.run(1, start_critic, model_dir)[0]
