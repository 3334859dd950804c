"""What each rank computes for the tests of layouts and conformance, by the code behind `megarlhf parity`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megarlhf.data.types import TargetValues, TrainingRows, starts_of
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.sharing import SharedWeights
from megarlhf.formats.shared_memory import SharedTensors, checksum
from megarlhf.parallel.groups import all_gather_objects
from megarlhf.trainers.parity import (
    compare,
    hf_parts,
    scales,
    write_reference,
)
from megarlhf.trainers.parity_cases import (
    ObjectiveName,
    fitting,
    parity_case,
    parity_rows,
)
from tests.distributed.layouts import SINGLE, Layout, build, world
from tests.tiny_models import VOCAB_SIZE

Parts = list[tuple[str, tuple[slice, ...], Tensor]]  # HF name, this rank's part of it, the numbers


def make_rows(*, seed: int = 5) -> TrainingRows:
    """Nine short rows in three groups."""
    return parity_rows(VOCAB_SIZE, seed=seed)


def sequences(rows: TrainingRows) -> list[tuple[list[int], int]]:
    """Tokens and prompt length of each row."""
    ids = np.split(rows.input_ids, np.cumsum(rows.lengths)[:-1])
    return [(tokens.tolist(), int(length)) for tokens, length in zip(ids, rows.prompt_lengths, strict=True)]


def by_row(rows: TrainingRows, found: TargetValues) -> dict[int, Tensor]:
    """Values of the rows that a rank has, one tensor [num_targets] each."""
    places = {int(index): place for place, index in enumerate(found.indices)}
    starts, values = starts_of(rows.num_targets), torch.from_numpy(found.values)
    spans = {row: range(int(starts[row]), int(starts[row]) + int(rows.num_targets[row])) for row in range(len(rows))}
    return {row: values[[places[i] for i in span]] for row, span in spans.items() if span[0] in places}


def build_for(objective: ObjectiveName, layout: Layout, model_dir: Path) -> MegatronEngine:
    """An engine with the objective's head, at a temperature that is not 1."""
    return build(layout, model_dir, head=parity_case(objective).head, temperature=0.7)


def reference_case(
    rank: int,
    world_size: int,
    init_method: str,
    layout: Layout,
    model_dir: Path,
    targets: dict[ObjectiveName, Path],
) -> dict[str, dict[str, float]]:
    """Write one process's results for each objective to its target; returns how large they are."""
    with world(layout, rank, init_method):
        for objective, target in targets.items():
            write_reference(build_for(objective, layout, model_dir), objective, make_rows(), target)
        return {objective: scales(target) for objective, target in targets.items()}


def compare_case(
    rank: int,
    world_size: int,
    init_method: str,
    layout: Layout,
    model_dir: Path,
    sources: dict[ObjectiveName, Path],
) -> dict[str, dict[str, float]]:
    """For each objective, largest differences of this layout's results to those in its source."""
    with world(layout, rank, init_method):
        return {
            objective: differences_to(source, layout, model_dir, objective) for objective, source in sources.items()
        }


def differences_to(source: Path, layout: Layout, model_dir: Path, objective: ObjectiveName) -> dict[str, float]:
    """Largest differences of an engine's results to those in `source`, and of its reference model after the step."""
    engine, rows = build_for(objective, layout, model_dir), make_rows()
    engine.keep_reference()
    differences, rows = compare(engine, objective, rows, source), fitting(engine, rows, parity_case(objective))
    with engine.reference_weights():
        found = engine.forward(engine.micro_batches(rows))
    expected = load_file(source / "tokens.safetensors")
    kept = (torch.from_numpy(found.values) - expected["forward"][found.indices]).abs()
    return differences | {"reference": float(kept.max()) if len(kept) else 0.0}


def sabotaged_case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, sabotage: str, source: Path
) -> dict[str, float]:
    """Differences of an engine whose optimizer does not do what it should."""
    with world(layout, rank, init_method):
        engine = build_for("sft", layout, model_dir)
        kept = engine.optimizer.step

        def step() -> Any:
            for group in engine.optimizer.param_groups:
                group["lr"] *= {"no step": 0.0, "wrong way": -1.0, "half": 0.5}[sabotage]
            return kept()

        engine.optimizer.step = step
        return compare(engine, "sft", make_rows(), source)


@dataclass
class Result:
    """One process's forward results and gradients."""

    forward: dict[int, Tensor] = field(default_factory=dict)  # row -> log-probs or values
    gradients: Parts = field(default_factory=list)


def conformance_case(
    rank: int,
    world_size: int,
    init_method: str,
    layout: Layout,
    model_dir: Path,
    objective: ObjectiveName,
    temperature: float,
) -> Result:
    """Forward and gradients of one process, to compare with Transformers'."""
    with world(SINGLE, rank, init_method):
        case = parity_case(objective)
        engine = build(layout, model_dir, head=case.head, temperature=temperature)
        rows = fitting(engine, make_rows())
        found = engine.forward(engine.micro_batches(rows))
        result, batches = Result(forward=by_row(rows, found)), engine.micro_batches(rows)
        engine.accumulate_gradients(batches, case.objective, denominator=case.denominator(rows))
        result.gradients = parts(engine, gradients=True)
        return result


def parts(engine: MegatronEngine, *, gradients: bool) -> Parts:
    """Copies of this rank's gradients or weights under their HF names."""
    return [(name, index, part.clone()) for name, index, part in hf_parts(engine, gradients=gradients)]


def assemble(results: list[Parts]) -> dict[str, Tensor]:
    """Whole tensors from every rank's parts; NaN where no rank has a number."""
    whole: dict[str, Tensor] = {}
    stops: dict[str, list[int]] = {}
    for name, index, part in (entry for rank in results for entry in rank):
        present = [s.stop if s.stop is not None else n for s, n in zip(index, part.shape, strict=True)]
        stops[name] = [max(a, b) for a, b in zip(present, stops.get(name, present), strict=True)]
    for name, index, part in (entry for rank in results for entry in rank):
        whole.setdefault(name, torch.full(stops[name], torch.nan))[index] = part
    return whole


def read_shared(shared: SharedWeights) -> dict[str, Tensor]:
    """Every HF tensor as any process reads it from all ranks' memory; all ranks call it."""
    digests, blocks = all_gather_objects(shared.refresh()), all_gather_objects(shared.blocks)
    tensors = SharedTensors([block for part in blocks for block in part])
    assert all(block.pieces for block in tensors.blocks)  # nothing that is padding alone
    found = checksum(tensors.digest(number) for number in range(len(tensors.blocks)))
    assert found == checksum(digest for part in digests for digest in part)
    whole = {name: tensors.read(name) for name in tensors.names}
    dist.barrier()
    return whole
