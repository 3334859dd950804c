"""Every layout gives the one-process result: per-token numbers, loss, gradients, one optimizer step."""

from pathlib import Path

import pytest
import torch

from tests.distributed.cases import OBJECTIVES, Result, assemble, parity_case
from tests.distributed.layouts import LAYOUTS, SINGLE
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

TOKEN_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE, STEP_TOLERANCE = 1e-5, 1e-6, 1e-6, 1e-4


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("parity"), tied=request.param, family="qwen3")


@pytest.fixture(scope="module")
def single(ranks: RankPool, model_dir: Path) -> dict[str, Result]:
    return {name: ranks.run(1, parity_case, SINGLE, model_dir, name, 0.7)[0] for name in OBJECTIVES}


def _worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(expected)
    return max(float((found[name] - expected[name]).abs().nan_to_num(nan=torch.inf).max()) for name in expected)


def _merge(results: list[dict[int, torch.Tensor]]) -> torch.Tensor:
    merged = {row: values for part in results for row, values in part.items()}
    return torch.cat([merged[row] for row in range(len(merged))])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(
    ranks: RankPool, model_dir: Path, single: dict[str, Result], name: str, objective: str
) -> None:
    layout, expected = LAYOUTS[name], single[objective]
    results = ranks.run(layout.world_size, parity_case, layout, model_dir, objective, 0.7)
    differences = {
        "tokens": float((_merge([r.forward for r in results]) - _merge([expected.forward])).abs().max()),
        "training tokens": float((_merge([r.outputs for r in results]) - _merge([expected.outputs])).abs().max()),
        "loss": max(abs(r.loss - expected.loss) for r in results),
        "metrics": max(abs(r.metrics[m] - v) for r in results for m, v in expected.metrics.items())
        if expected.metrics
        else 0.0,
        "gradients": _worst(assemble([r.gradients for r in results]), assemble([expected.gradients])),
        "grad norm": max(abs(r.grad_norm - expected.grad_norm) for r in results),
        "step": _worst(assemble([r.weights for r in results]), assemble([expected.weights])),
    }
    print(f"{name:22} {objective:7}", "  ".join(f"{key} {value:.1e}" for key, value in differences.items()))
    assert differences["tokens"] <= TOKEN_TOLERANCE
    assert differences["training tokens"] <= TOKEN_TOLERANCE
    assert differences["loss"] <= LOSS_TOLERANCE
    assert differences["metrics"] <= TOKEN_TOLERANCE
    assert differences["gradients"] <= GRADIENT_TOLERANCE
    assert differences["grad norm"] <= 1e-5 * max(1.0, expected.grad_norm)
    assert differences["step"] <= STEP_TOLERANCE
    assert max(float(t.abs().max()) for t in assemble([expected.gradients]).values()) > 1e-2, (
        "the gradients are large enough to tell"
    )
