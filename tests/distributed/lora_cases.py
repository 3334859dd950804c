"""What each rank computes for the tests of adapters."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megarlhf.config.lora import LoraArguments
from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.export import export_hf
from megarlhf.engine.sharing import SharedWeights
from megarlhf.trainers.parity import whole_gradients
from megarlhf.trainers.parity_cases import fitting, parity_case, parity_rows
from tests.distributed.cases import assemble, by_row, read_shared
from tests.distributed.layouts import Layout, build, world
from tests.tiny_models import VOCAB_SIZE

STARTED = 0.02  # of B, which is zero at first: gradients of A need other numbers


@dataclass
class Trained:
    """One rank's part of a run with adapters."""

    forward: dict[int, Tensor] = field(default_factory=dict)
    off: dict[int, Tensor] = field(default_factory=dict)  # without the adapters
    trained: dict[int, Tensor] = field(default_factory=dict)  # after the steps
    loss: float = 0.0
    grad_norms: list[float] = field(default_factory=list)
    gradients: list[tuple[str, tuple[slice, ...], Tensor]] = field(default_factory=list)
    after: list[tuple[str, tuple[slice, ...], Tensor]] = field(default_factory=list)
    base_moved: float = 0.0
    gradient_bytes: int = 0


def start_adapters(engine: MegatronEngine) -> None:
    """Give every B matrix numbers, the same in each layout."""
    assert engine.adapters is not None
    for tensor in engine.adapters.tensors():
        if "lora_B" in tensor.name:
            generator = torch.Generator().manual_seed(sum(tensor.name.encode()))
            whole = STARTED * torch.randn(tensor.shape, generator=generator)
            tensor.parameter.data.copy_(whole[tensor.index(engine.ranks)])
    engine.optimizer.reload_model_params()


def trained_case(
    rank: int,
    world_size: int,
    init_method: str,
    layout: Layout,
    model_dir: Path,
    lora: LoraArguments,
    head: str,
    hf: Path | None,
    save: Path | None,
    load: Path | None,
    steps: tuple[int, int],
) -> Trained:
    """Forward, gradients, then the steps of this range of a run; export, save and load where a path is given."""
    with world(layout, rank, init_method):
        case = parity_case("sft" if head == "lm" else "critic")
        engine = build(layout, model_dir, head=head, lora=lora)
        assert engine.adapters is not None
        start_adapters(engine)
        if load is not None:
            load_engine(engine, load)
        frozen = {name: p.detach().clone() for name, p in engine.named_parameters() if not p.requires_grad}
        found = Trained()
        rows = fitting(engine, parity_rows(VOCAB_SIZE))
        found.forward = by_row(rows, engine.forward(engine.micro_batches(rows)))
        with engine.reference_weights():
            found.off = by_row(rows, engine.forward(engine.micro_batches(rows)))
        engine.wake("gradients")
        with whole_gradients(engine):
            batches = engine.micro_batches(rows)
            found.loss, *_ = engine.accumulate_gradients(batches, case.objective, denominator=case.denominator(rows))
        found.gradient_bytes = engine.memory.num_bytes()["gradients"]
        for tensor in engine.adapters.tensors():
            gradient = tensor.parameter.main_grad.clone()  # type: ignore[attr-defined]
            found.gradients.append((tensor.name, tensor.index(engine.ranks), gradient))
        for step in range(*steps):
            rows = fitting(engine, parity_rows(VOCAB_SIZE, seed=step))
            result = engine.train_step(rows, case.objective, denominator=case.denominator(rows))
            found.grad_norms.append(result.grad_norm)
        rows = fitting(engine, parity_rows(VOCAB_SIZE))
        found.trained = by_row(rows, engine.forward(engine.micro_batches(rows)))
        engine.finish_param_gather()
        for tensor in engine.adapters.tensors():
            found.after.append((tensor.name, tensor.index(engine.ranks), tensor.parameter.detach().clone()))
        for name, p in engine.named_parameters():
            if name in frozen and not torch.equal(p, frozen[name]):
                found.base_moved = max(found.base_moved, float((p - frozen[name]).abs().max()))
        if save is not None:
            save_engine(engine, save)
        if hf is not None:
            export_hf(engine, hf)
        return found


def shared_case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, hf: Path
) -> dict[str, Tensor]:
    """Whole HF tensors as inference engines read them after two steps, and the adapters that they were merged with.

    The blocks are made before the last step, so that they must be renewed.
    """
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, lora=LoraArguments(lora_rank=4, lora_alpha=12))
        start_adapters(engine)
        for step in range(2):
            rows = parity_rows(VOCAB_SIZE, seed=step)
            shared = SharedWeights(engine) if step == 1 else None
            engine.train_step(rows, parity_case("sft").objective, denominator=50.0)
        assert shared is not None
        found = {name: tensor.clone() for name, tensor in read_shared(shared).items()}
        export_hf(engine, hf)
        return found


def profiled_case(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, head: str) -> set[str]:
    """The operations of a step."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, head=head, lora=LoraArguments(lora_rank=4, target_modules=("q_proj",)))
        case, rows = parity_case("sft" if head == "lm" else "critic"), fitting(engine, parity_rows(VOCAB_SIZE))
        with torch.profiler.profile() as profile:
            engine.train_step(rows, case.objective, denominator=50.0)
        return {event.key for event in profile.key_averages()}


def dropout_case(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> list[list[float]]:
    """Losses of three steps: with dropout, the same again, with dropout from a checkpoint after one, and without."""
    runs, saved = [], model_dir.with_name("saved")
    with world(layout, rank, init_method):
        for number, (probability, start) in enumerate(((0.5, 0), (0.5, 0), (0.5, 1), (0.0, 0))):
            engine = build(layout, model_dir, lora=LoraArguments(lora_rank=4, lora_dropout=probability))
            start_adapters(engine)
            if start:
                load_engine(engine, saved)
            losses = []
            for step in range(start, 3):
                rows = parity_rows(VOCAB_SIZE, seed=step)
                losses.append(engine.train_step(rows, parity_case("sft").objective, denominator=50.0).loss)
                if step == number == 0:
                    save_engine(engine, saved)
            runs.append(losses)
    return runs


def whole(results: list[Trained], of: str) -> dict[str, Tensor]:
    """Whole tensors of all ranks."""
    return assemble([getattr(result, of) for result in results])


def rows_of(results: list[Trained], of: str) -> dict[int, Tensor]:
    """Every row's numbers."""
    return {row: values for result in results for row, values in getattr(result, of).items()}
