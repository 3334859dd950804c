"""Every layout gives the one-process result: per-token numbers, loss, gradients, one optimizer step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.cases import OBJECTIVES, Result, assemble, parity_case
from tests.distributed.layouts import (
    LARGE_LAYOUTS,
    LARGE_MOE_LAYOUTS,
    LATENT_LAYOUTS,
    LAYOUTS,
    MOE_LAYOUTS,
    WINDOW_LAYOUTS,
    Layout,
)
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

TOKEN_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE, STEP_TOLERANCE = 1e-5, 1e-6, 1e-6, 1e-4


class Models:
    """Models by kind, made once, with their one-process results."""

    def __init__(self, ranks: RankPool, root: Path) -> None:
        self._ranks, self._root = ranks, root
        self._results: dict[tuple[str, str, bool], Result] = {}

    def directory(self, kind: str) -> Path:
        """ "tied", "untied" and "wide" (four KV heads) are dense, the others names of tiny_models' families."""
        target = self._root / kind
        if not target.exists():
            dense = kind in ("tied", "untied", "wide")
            options = {"num_key_value_heads": 4} if kind == "wide" else {}
            make_model(target, tied=kind == "tied", family="qwen3" if dense else kind, **options)
        return target

    def single(self, kind: str, objective: str, *, bf16: bool = False) -> Result:
        """What one process computes."""
        key = (kind, objective, bf16)
        if key not in self._results:
            layout = Layout(bf16=bf16)
            self._results[key] = self._ranks.run(1, parity_case, layout, self.directory(kind), objective, 0.7)[0]
        return self._results[key]


@pytest.fixture(scope="module")
def models(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(ranks, tmp_path_factory.mktemp("parity"))


def _worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(expected)
    return max(float((found[name] - expected[name]).abs().nan_to_num(nan=torch.inf).max()) for name in expected)


def _merge(results: list[dict[int, torch.Tensor]]) -> torch.Tensor:
    merged = {row: values for part in results for row, values in part.items()}
    return torch.cat([merged[row] for row in range(len(merged))])


def _differences(expected: Result, results: list[Result]) -> dict[str, float]:
    """Largest differences to the one-process result, printed as a row of the matrix."""
    return {
        "tokens": float((_merge([r.forward for r in results]) - _merge([expected.forward])).abs().max()),
        "training tokens": float((_merge([r.outputs for r in results]) - _merge([expected.outputs])).abs().max()),
        "loss": max(abs(r.loss - expected.loss) for r in results),
        "metrics": max((abs(r.metrics[m] - v) for r in results for m, v in expected.metrics.items()), default=0.0),
        "gradients": _worst(assemble([r.gradients for r in results]), assemble([expected.gradients])),
        "grad norm": max(abs(r.grad_norm - expected.grad_norm) for r in results),
        "step": _worst(assemble([r.weights for r in results]), assemble([expected.weights])),
        "tokens after": float((_merge([r.after for r in results]) - _merge([expected.after])).abs().max()),
    }


def _check(ranks: RankPool, models: Models, kind: str, name: str, layout: Layout, objective: str) -> None:
    expected = models.single(kind, objective)
    results = ranks.run(layout.world_size, parity_case, layout, models.directory(kind), objective, 0.7)
    differences = _differences(expected, results)
    print(f"{kind:9} {name:28} {objective:7}", "  ".join(f"{key} {value:.1e}" for key, value in differences.items()))
    assert differences["tokens"] <= TOKEN_TOLERANCE
    assert differences["training tokens"] <= TOKEN_TOLERANCE
    assert differences["loss"] <= LOSS_TOLERANCE
    assert differences["metrics"] <= TOKEN_TOLERANCE
    assert differences["gradients"] <= GRADIENT_TOLERANCE
    assert differences["grad norm"] <= 1e-5 * max(1.0, expected.grad_norm)
    assert differences["step"] <= STEP_TOLERANCE
    assert differences["tokens after"] <= 10 * TOKEN_TOLERANCE
    moved = (_merge([expected.after]) - _merge([expected.forward])).abs().max()
    assert moved > 100 * TOKEN_TOLERANCE, "the step moves results enough to tell"
    assert max(float(t.abs().max()) for t in assemble([expected.gradients]).values()) > 1e-2, (
        "the gradients are large enough to tell"
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_layout_equals_one_process(ranks: RankPool, models: Models, kind: str, name: str, objective: str) -> None:
    _check(ranks, models, kind, name, LAYOUTS[name], objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MOE_LAYOUTS)
def test_layout_of_experts_equals_one_process(ranks: RankPool, models: Models, name: str, objective: str) -> None:
    _check(ranks, models, "mixtral", name, MOE_LAYOUTS[name], objective)


@pytest.mark.parametrize("objective", ["actor", "critic"])
@pytest.mark.parametrize("name", WINDOW_LAYOUTS)
@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_layout_with_windows_equals_one_process(
    ranks: RankPool, models: Models, kind: str, name: str, objective: str
) -> None:
    _check(ranks, models, kind, name, WINDOW_LAYOUTS[name], objective)


@pytest.mark.parametrize("objective", ["actor", "critic"])
@pytest.mark.parametrize("name", LATENT_LAYOUTS)
def test_layout_of_latent_attention_equals_one_process(
    ranks: RankPool, models: Models, name: str, objective: str
) -> None:
    _check(ranks, models, "deepseek-v3", name, LATENT_LAYOUTS[name], objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", LARGE_LAYOUTS)
def test_large_layout_equals_one_process(ranks: RankPool, models: Models, name: str, objective: str) -> None:
    _check(ranks, models, "wide" if name == "TP4" else "tied", name, LARGE_LAYOUTS[name], objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["actor", "critic"])
@pytest.mark.parametrize("name", ["CP4-p2p", "CP4-all-gather", "TP2-SP-CP2", "TP2-SP-PP2-VPP2", "TP2-SP-PP2-CP2"])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_large_layout_with_windows_equals_one_process(
    ranks: RankPool, models: Models, kind: str, name: str, objective: str
) -> None:
    _check(ranks, models, kind, name, LARGE_LAYOUTS[name], objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", LARGE_MOE_LAYOUTS)
@pytest.mark.parametrize("kind", ["qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3"])
def test_large_layout_of_experts_equals_one_process(
    ranks: RankPool, models: Models, kind: str, name: str, objective: str
) -> None:
    _check(ranks, models, kind, name, LARGE_MOE_LAYOUTS[name], objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["TP2-SP", "PP2-VPP2", "CP2-p2p", "DP2-distopt-overlap"])
def test_bf16_layout_equals_one_bf16_process(ranks: RankPool, models: Models, name: str, objective: str) -> None:
    """bfloat16 keeps 8 bits: results agree to a few roundings, and the float32 main weights take the same step."""
    layout = replace(LAYOUTS[name], bf16=True)
    expected = models.single("untied", objective, bf16=True)
    results = ranks.run(layout.world_size, parity_case, layout, models.directory("untied"), objective, 0.7)
    differences = _differences(expected, results)
    print(f"bf16      {name:28} {objective:7}", "  ".join(f"{key} {value:.1e}" for key, value in differences.items()))
    assert differences["tokens"] <= 0.1
    assert differences["loss"] <= 0.02 * max(1.0, abs(expected.loss))
    assert differences["grad norm"] <= 0.03 * max(1.0, expected.grad_norm)
    assert differences["step"] <= 2e-3
