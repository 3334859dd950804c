"""What layers are computed with, decided from what is importable and the flags; nothing falls back in silence."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megarlhf.config.layouts import KernelArguments
from megarlhf.models import build
from megarlhf.models.backend import Backend, Finder, Fusion, decide_backend, resolve_transformer_impl
from tests.distributed.cases import compare_case, reference_case
from tests.distributed.layouts import SINGLE
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

EVERYTHING = ("transformer_engine", "fused_weight_gradient_mlp_cuda", "apex", "flash_attn")


def importable(*names: str) -> Finder:
    """importlib.util.find_spec on a machine with these modules."""
    return lambda name: object() if name in names else None


def decide(*installed: str, device: str = "gpu", swiglu: bool = True, latent: bool = False, **flags: Any) -> Backend:
    return decide_backend(
        KernelArguments(**flags), device=device, swiglu=swiglu, latent=latent, find=importable(*installed)
    )


def on(backend: Backend) -> set[str]:
    return {fusion.name for fusion in backend.fusions if fusion.on}


COMPILED = {"bias_activation_fusion", "bias_dropout_fusion"}
OF_TRANSFORMER_ENGINE = {"apply_rope_fusion", "moe_grouped_gemm", "flash_attention"}
ALL = COMPILED | OF_TRANSFORMER_ENGINE | {"gradient_accumulation_fusion", "fused_adam"}


@pytest.mark.parametrize(
    ("installed", "options", "missing"),
    [
        (EVERYTHING, {}, set()),
        (("transformer_engine",), {}, {"gradient_accumulation_fusion"}),
        (("transformer_engine", "apex"), {}, {"gradient_accumulation_fusion"}),  # apex without its extensions
        (EVERYTHING, {"latent": True}, {"apply_rope_fusion"}),
        (EVERYTHING, {"swiglu": False}, {"bias_activation_fusion"}),
        (EVERYTHING, {"rope_fusion": False}, {"apply_rope_fusion"}),
        (EVERYTHING, {"gradient_accumulation_fusion": False}, {"gradient_accumulation_fusion"}),
        (EVERYTHING, {"bias_swiglu_fusion": False}, {"bias_activation_fusion"}),
        (EVERYTHING, {"bias_dropout_fusion": False}, {"bias_dropout_fusion"}),
        (EVERYTHING, {"transformer_impl": "local"}, OF_TRANSFORMER_ENGINE),
        (("apex",), {"transformer_impl": "local"}, ALL - COMPILED - {"fused_adam"}),
        ((), {"transformer_impl": "local"}, ALL - COMPILED),
        (EVERYTHING, {"device": "cpu"}, ALL - {"fused_adam"}),
        ((), {"device": "cpu"}, ALL),
    ],
)
def test_what_is_on(installed: Sequence[str], options: dict[str, Any], missing: set[str]) -> None:
    assert on(decide(*installed, **options)) == ALL - missing


def test_the_start_log_says_why() -> None:
    lines = decide("transformer_engine", "flash_attn", bias_swiglu_fusion=False).lines()
    assert lines[0] == "transformer_impl: transformer_engine"
    assert "apply_rope_fusion: on (TransformerEngine's THD kernel)" in lines
    assert "bias_activation_fusion: off (--no-bias-swiglu-fusion)" in lines
    assert (
        "gradient_accumulation_fusion: off (needs apex with its CUDA extensions (fused_weight_gradient_mlp_cuda))"
        in lines
    )
    assert "flash_attention: on (flash_attn or cuDNN, as TransformerEngine chooses)" in lines
    assert "fused_adam: on (TransformerEngine's FusedAdam)" in lines
    assert "fused_adam: on (apex's FusedAdam)" in decide("apex", device="cpu").lines()


@pytest.mark.parametrize(
    ("asked", "device", "installed", "expected"),
    [
        (None, "cpu", EVERYTHING, "local"),
        (None, "gpu", EVERYTHING, "transformer_engine"),
        ("local", "gpu", (), "local"),
        ("transformer_engine", "gpu", EVERYTHING, "transformer_engine"),
        (None, "gpu", (), "transformer_impl=None; .* not installed: .*set transformer_impl=local"),
        ("transformer_engine", "gpu", ("apex",), "transformer_impl=transformer_engine; .* not installed"),
        ("transformer_engine", "cpu", EVERYTHING, "transformer_impl=transformer_engine; .* none here"),
    ],
)
def test_the_implementation(asked: Any, device: Any, installed: Sequence[str], expected: str) -> None:
    if expected in ("local", "transformer_engine"):
        assert resolve_transformer_impl(asked, device=device, find=importable(*installed)) == expected
        return
    with pytest.raises(ValueError, match=expected):
        resolve_transformer_impl(asked, device=device, find=importable(*installed))


def fused_case(rank: int, world_size: int, init_method: str, model_dir: Path, source: Path) -> Any:
    """The compiled functions, uncompiled here, against the plain ones that `source` was computed with."""
    compiled = {"bias_activation_fusion", "bias_dropout_fusion"}
    names = ("apply_rope_fusion", "gradient_accumulation_fusion", "moe_grouped_gemm", *sorted(compiled))
    fusions = tuple(Fusion(name, name in compiled, "the test") for name in names)
    with pytest.MonkeyPatch.context() as patch:
        backend = Backend(transformer_impl="local", fusions=fusions)
        patch.setattr(build, "model_backend", lambda *arguments, **options: backend)
        return compare_case(rank, world_size, init_method, SINGLE, model_dir, {"sft": source})["sft"]


@pytest.mark.parametrize("family", ["llama", "qwen2-moe"])
def test_the_fused_functions_compute_the_same(ranks: RankPool, tmp_path: Path, family: str) -> None:
    model_dir = make_model(tmp_path / "model", family=family)
    ranks.run(1, reference_case, SINGLE, model_dir, {"sft": tmp_path / "reference"})
    (differences,) = ranks.run(1, fused_case, model_dir, tmp_path / "reference")
    assert differences["forward"] < 2e-5 and differences["loss"] < 1e-6
    assert 0 < differences["gradients"] < 1e-6  # by another order of operations
    assert differences["step"] < 1e-6 and differences["movement"] < 1e-4
