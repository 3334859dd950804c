"""Every layout gives the one-process result: per-token numbers, loss, gradients, one optimizer step."""

from dataclasses import replace
from pathlib import Path

import pytest

from megarlhf.trainers.parity_cases import (
    OBJECTIVES,
    OF_SEQUENCES,
    ObjectiveName,
)
from tests.distributed.cases import compare_case, reference_case, sabotaged_case
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
LARGER = {"ipo": 40.0}  # it squares sums of log-probs: loss and gradients are so much larger than the others'
ROLES: tuple[ObjectiveName, ...] = ("actor", "critic")
SEQUENCE_LAYOUTS = (
    *(
        "TP2-SP",
        "PP2-VPP2",
        "CP2-p2p",
        "DP2-distopt",
        "TP2-PP2",
        "unpacked",
        "large-micro-batch",
        "share-prefix-TP2-SP",
    ),
    *("share-prefix-PP2",),
)
Differences = dict[str, float]  # by quantity
Scales = dict[str, float]


class Models:
    """Models by kind, made once, their results, and the rows of the matrix of differences.

    A world is set up once for all objectives of a test: that takes longer than what is computed in it.
    """

    def __init__(self, ranks: RankPool, root: Path, matrix: list[str]) -> None:
        self._ranks, self._root, self._matrix = ranks, root, matrix
        self._scales: dict[tuple[str, bool], dict[str, Scales]] = {}
        self._differences: dict[tuple[str, Layout, tuple[str, ...]], dict[str, Differences]] = {}

    def directory(self, kind: str) -> Path:
        """ "tied", "untied" and "wide" (four KV heads) are dense, the others names of tiny_models' families."""
        target = self._root / kind
        if not target.exists():
            dense = kind in ("tied", "untied", "wide")
            options = {"num_key_value_heads": 4} if kind == "wide" else {}
            make_model(target, tied=kind == "tied", family="qwen3" if dense else kind, **options)
        return target

    def reference(self, kind: str, objective: ObjectiveName, *, bf16: bool = False) -> tuple[Path, Scales]:
        """Where one process's results lie, and how large they are."""
        every = (*OBJECTIVES, *OF_SEQUENCES)
        targets: dict[ObjectiveName, Path] = {each: self._root / f"{kind}-{each}-{bf16}" for each in every}
        if (kind, bf16) not in self._scales:
            arguments = (Layout(bf16=bf16), self.directory(kind), targets)
            self._scales[kind, bf16] = self._ranks.run(1, reference_case, *arguments)[0]
        return targets[objective], self._scales[kind, bf16][objective]

    def differences(
        self,
        kind: str,
        name: str,
        layout: Layout,
        objective: ObjectiveName,
        objectives: tuple[ObjectiveName, ...] = OBJECTIVES,
    ) -> tuple[Differences, Scales]:
        """Largest differences, also as a row of the matrix, and how large the numbers are.

        Args:
            objectives: what is computed in the same world.
        """
        key = (kind, layout, objectives)
        if key not in self._differences:
            sources = {each: self.reference(kind, each, bf16=layout.bf16)[0] for each in objectives}
            arguments = (layout, self.directory(kind), sources)
            by_rank = self._ranks.run(layout.world_size, compare_case, *arguments)
            self._differences[key] = {
                each: by_rank[0][each] | {"reference": max(found[each]["reference"] for found in by_rank)}
                for each in objectives
            }
        differences = self._differences[key][objective]
        row = "  ".join(f"{quantity} {difference:.1e}" for quantity, difference in differences.items())
        self._matrix.append(f"{kind:11} {name:30} {objective:7}{' bf16' if layout.bf16 else ''} {row}")
        return differences, self.reference(kind, objective, bf16=layout.bf16)[1]


@pytest.fixture(scope="module")
def models(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, matrix: list[str]) -> Models:
    return Models(ranks, tmp_path_factory.mktemp("parity"), matrix)


def _check(
    models: Models,
    kind: str,
    name: str,
    layout: Layout,
    objective: ObjectiveName,
    objectives: tuple[ObjectiveName, ...] = OBJECTIVES,
) -> None:
    differences, scales = models.differences(kind, name, layout, objective, objectives)
    larger = LARGER.get(objective, 1.0)
    assert scales["gradients"] > 1e-2, "the gradients are large enough to tell"
    assert scales["moved"] > 100 * TOKEN_TOLERANCE, "so is what the step does"
    assert differences["forward"] <= TOKEN_TOLERANCE
    assert differences["training"] <= TOKEN_TOLERANCE
    assert differences["loss"] <= LOSS_TOLERANCE * larger
    assert differences["metrics"] <= TOKEN_TOLERANCE
    assert differences["gradients"] <= GRADIENT_TOLERANCE * larger
    assert differences["by tensor"] <= 1e-4
    assert differences["grad norm"] <= 1e-5 * max(1.0, scales["grad norm"])
    assert differences["step"] <= STEP_TOLERANCE
    assert differences["movement"] <= 1e-3
    assert differences["after"] <= 10 * TOKEN_TOLERANCE
    assert differences["reference"] <= TOKEN_TOLERANCE


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_layout_equals_one_process(models: Models, kind: str, name: str, objective: ObjectiveName) -> None:
    _check(models, kind, name, LAYOUTS[name], objective)


@pytest.mark.parametrize("objective", OF_SEQUENCES)
@pytest.mark.parametrize("name", SEQUENCE_LAYOUTS)
def test_layout_equals_one_process_for_sequences(models: Models, name: str, objective: ObjectiveName) -> None:
    """Tokens of a sequence lie on several ranks, or its pair in the same packed sequence."""
    _check(models, "untied", name, LAYOUTS[name], objective, OF_SEQUENCES)


@pytest.mark.parametrize("objective", OF_SEQUENCES)
def test_layout_of_experts_equals_one_process_for_sequences(models: Models, objective: ObjectiveName) -> None:
    _check(models, "mixtral", "EP2", MOE_LAYOUTS["EP2"], objective, OF_SEQUENCES)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MOE_LAYOUTS)
def test_layout_of_experts_equals_one_process(models: Models, name: str, objective: ObjectiveName) -> None:
    _check(models, "mixtral", name, MOE_LAYOUTS[name], objective)


@pytest.mark.parametrize("objective", ROLES)
@pytest.mark.parametrize("name", WINDOW_LAYOUTS)
@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_layout_with_windows_equals_one_process(models: Models, kind: str, name: str, objective: ObjectiveName) -> None:
    _check(models, kind, name, WINDOW_LAYOUTS[name], objective, ROLES)


@pytest.mark.parametrize("objective", ROLES)
@pytest.mark.parametrize("name", LATENT_LAYOUTS)
def test_layout_of_latent_attention_equals_one_process(models: Models, name: str, objective: ObjectiveName) -> None:
    _check(models, "deepseek-v3", name, LATENT_LAYOUTS[name], objective, ROLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_LAYOUTS)
def test_large_layout_equals_one_process(models: Models, name: str) -> None:
    for objective in OBJECTIVES:
        _check(models, "wide" if name == "TP4" else "tied", name, LARGE_LAYOUTS[name], objective)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CP4-p2p", "CP4-all-gather", "TP2-SP-CP2", "TP2-SP-PP2-VPP2", "TP2-SP-PP2-CP2"])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_large_layout_with_windows_equals_one_process(models: Models, kind: str, name: str) -> None:
    for objective in ROLES:
        _check(models, kind, name, LARGE_LAYOUTS[name], objective, ROLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_MOE_LAYOUTS)
@pytest.mark.parametrize("kind", ["qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3"])
def test_large_layout_of_experts_equals_one_process(models: Models, kind: str, name: str) -> None:
    for objective in OBJECTIVES:
        _check(models, kind, name, LARGE_MOE_LAYOUTS[name], objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["TP2-SP", "PP2-VPP2", "CP2-p2p", "DP2-distopt-overlap"])
def test_bf16_layout_equals_one_bf16_process(models: Models, name: str, objective: ObjectiveName) -> None:
    """bfloat16 keeps 8 bits: results agree to a few roundings, and the float32 main weights move nearly alike."""
    layout = replace(LAYOUTS[name], bf16=True)
    differences, scales = models.differences("untied", name, layout, objective)
    assert differences["forward"] <= 0.1
    assert differences["loss"] <= 0.02 * max(1.0, abs(scales["loss"]))
    assert differences["grad norm"] <= 0.03 * max(1.0, scales["grad norm"])
    assert differences["movement"] <= 0.15  # a step that is not taken is off by 1, see below


@pytest.mark.parametrize(("sabotage", "movement"), [("no step", 1.0), ("wrong way", 2.0), ("half", 0.5)])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_movement_tells_a_step_that_is_not_taken(
    ranks: RankPool, models: Models, bf16: bool, sabotage: str, movement: float
) -> None:
    source, _ = models.reference("untied", "sft", bf16=bf16)
    layout = Layout(bf16=bf16, data=2, distributed_optimizer=True)
    found = ranks.run(2, sabotaged_case, layout, models.directory("untied"), sabotage, source)
    assert [differences["movement"] for differences in found] == pytest.approx([movement] * 2, rel=0.1)
