"""What a layout's ranks hold, as Megatron-Core says it, fits together to the whole model."""

import math
from pathlib import Path

import pytest
import torch.distributed as dist

from megarlhf.conversion.cuts import Region, cut_model
from megarlhf.conversion.to_hf import _forms
from megarlhf.formats.huggingface import read_config
from megarlhf.models.registry import find_architecture
from tests.tiny_models import make_model


@pytest.mark.parametrize(
    ("family", "tied", "sizes"),
    [
        ("llama", False, {}),
        ("llama", True, {"tensor": 2, "pipeline": 2}),
        ("qwen3", True, {"pipeline": 4}),
        ("mixtral", False, {"tensor": 2, "expert": 2}),
        ("qwen3-moe", False, {"pipeline": 2, "expert": 4}),
    ],
)
def test_chunks_fill_every_tensor_once(tmp_path: Path, family: str, tied: bool, sizes: dict[str, int]) -> None:
    hf = read_config(make_model(tmp_path / "model", family=family, tied=tied))
    arch = find_architecture(hf)
    model = cut_model(arch, hf, head="lm", **sizes)
    assert not dist.is_initialized()
    assert [weight.weight.hf for weight in model.weights] == [w.hf for w in arch.weight_maps(hf, tied=tied, head="lm")]
    filled: dict[str, int] = {}
    for weight in model.weights:
        chunks = [math.prod(chunk.shape) for chunk in weight.chunks]
        assert sum(chunks) == weight.num_elements, "chunks do not overlap and leave no hole"
        filled[weight.key] = filled.get(weight.key, 0) + weight.num_elements
    assert filled == {weight.key: math.prod(weight.tensor_shape) for weight in model.weights}
    stages = [weight.stage for weight in model.weights]
    assert stages == sorted(stages) and set(stages) == set(range(sizes.get("pipeline", 1)))


def test_tensors_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    hf = read_config(make_model(tmp_path / "model", family="mixtral"))
    arch = find_architecture(hf)
    one, many = (cut_model(arch, hf, head="lm", **s) for s in ({}, {"tensor": 2, "pipeline": 2, "expert": 2}))
    for first, second in zip(one.weights, many.weights, strict=True):
        assert (first.key, first.tensor_shape, first.region) == (second.key, second.tensor_shape, second.region)
    assert one.objects.keys() == many.objects.keys()


def test_a_layers_weight_is_looked_for_stacked_and_numbered(tmp_path: Path) -> None:
    """Either way round, whichever way Megatron-Core cuts this model."""
    hf = read_config(make_model(tmp_path / "model", num_hidden_layers=3))
    weights = {weight.weight.hf: weight for weight in cut_model(find_architecture(hf), hf, head="lm").weights}
    stacked = weights[("model.layers.2.mlp.down_proj.weight",)]
    rows, columns = stacked.shape
    assert (stacked.tensor_shape, stacked.region.offset) == ((3, rows, columns), (2, 0, 0))
    numbered = {form.key: form for form in _forms(stacked, 3)}["decoder.layers.2.mlp.linear_fc2.weight"]
    assert (numbered.tensor_shape, numbered.region) == ((rows, columns), Region(offset=(0, 0), shape=(rows, columns)))
    assert {form.key: form for form in _forms(numbered, 3)}[stacked.key] == stacked
    (embedding,) = _forms(weights[("model.embed_tokens.weight",)], 3)
    assert embedding.key == "embedding.word_embeddings.weight"
