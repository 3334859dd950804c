"""Parts of an engine sleep and wake: their storages are really freed, and training afterwards is equal bit for bit."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from megarlhf.config.lora import LoraArguments
from megarlhf.config.roles import PARTS, Part
from megarlhf.engine import engine as engine_module
from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.schedule import run_forward
from megarlhf.engine.sharing import SharedWeights
from megarlhf.parallel.device import device_kind, release_memory
from megarlhf.trainers.parity_cases import (
    parity_case,
)
from tests.distributed.cases import make_rows
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.engine.test_refused_steps import everything
from tests.tiny_models import make_model

DISTRIBUTED = Layout(distributed_optimizer=True)
VARIANTS: dict[str, tuple[str, Layout]] = {
    "fp32": ("llama", SINGLE),
    "bf16": ("llama", replace(SINGLE, bf16=True)),
    "frozen": ("llama", DISTRIBUTED),
    "frozen, bf16": ("llama", replace(SINGLE, bf16=True)),
    "DP2, bf16, distributed optimizer": ("llama", replace(LAYOUTS["DP2-distopt"], bf16=True)),
    "DP2, overlap": ("llama", LAYOUTS["DP2-distopt-overlap"]),
    "chunks": ("llama", LAYOUTS["PP2-VPP2"]),
    "experts": ("deepseek-v3", replace(MOE_LAYOUTS["EP2-distopt"], bf16=True)),
    "adapters": ("llama", replace(LAYOUTS["DP2-distopt"], bf16=True)),
}


def built(variant: str, layout: Layout, model_dir: Path, **options: Any) -> MegatronEngine:
    """An engine, with every second layer and the embedding frozen where the variant says so."""
    build_model = engine_module.build_model

    def half_frozen(*args: Any, **kwargs: Any) -> Any:
        chunks, config = build_model(*args, **kwargs)
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(not ("embedding" in name or "layers.1." in name or "layers.3." in name))
        return chunks, config

    with pytest.MonkeyPatch.context() as patch:
        if variant.startswith("frozen"):
            patch.setattr(engine_module, "build_model", half_frozen)
        lora = LoraArguments(lora_rank=4) if variant == "adapters" else None
        return build(layout, model_dir, lora=lora, **options)


def tensors_of(engine: MegatronEngine, part: Part) -> Iterator[Tensor]:
    """The part's tensors as the model, its buffers and the optimizer hold them; found without engine/memory.py."""
    parameters = [p for _, p in engine.named_parameters()]
    if part == "parameters":
        yield from parameters
    elif part == "gradients" and engine.optimizer is not None:
        yield from (p.main_grad for p in parameters if p.requires_grad)
    elif part == "optimizer" and engine.optimizer is not None:
        of_model = {p.untyped_storage().data_ptr() for p in parameters}
        for single in engine.optimizer.chained_optimizers:
            mains = [p for group in single.optimizer.param_groups for p in group["params"]]
            yield from (p for p in mains if p.untyped_storage().data_ptr() not in of_model)
            for state in single.optimizer.state.values():
                yield from (state["exp_avg"], state["exp_avg_sq"])
    elif part == "reference":
        yield from vars(engine)["_reference"].tensors.values()


def whole(engine: MegatronEngine, part: Part) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors_of(engine, part)]


def step(engine: MegatronEngine, seed: int) -> list[Tensor]:
    """A step, and what it and the reference give."""
    result = engine.train_step(make_rows(seed=seed), parity_case("sft").objective, denominator=50.0)
    with engine.reference_weights():
        reference = engine.log_probs(make_rows()).values
    found = (reference, engine.log_probs(make_rows()).values)
    return [torch.tensor([result.loss, result.grad_norm]), *map(torch.from_numpy, found)]


def trained(
    rank: int, world_size: int, init_method: str, variant: str, model_dir: Path, sleepy: bool
) -> list[dict[str, Tensor]]:
    """All state and results after each of three steps, with random sleeps between them or without."""
    found = []
    with world(layout := VARIANTS[variant][1], rank, init_method):
        engine = built(variant, layout, model_dir)
        engine.keep_reference()
        order = random.Random(5)
        for seed in range(3):
            for _ in range(3 if sleepy else 0):
                parts = order.sample(PARTS, order.randint(1, 4))
                engine.sleep(*parts)
                engine.wake(*order.sample(parts, len(parts)))
                engine.memory.sleep("gradients", "reference", changed=False)
            results = {str(number): value for number, value in enumerate(step(engine, seed))}
            found.append(everything(engine) | results)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_equal_bit_for_bit_after_any_sleeps(ranks: RankPool, tmp_path: Path, variant: str) -> None:
    family, layout = VARIANTS[variant]
    model_dir = make_model(tmp_path / "model", family=family)
    awake = ranks.run(layout.world_size, trained, variant, model_dir, False)
    slept = ranks.run(layout.world_size, trained, variant, model_dir, True)
    for expected_steps, found_steps in zip(awake, slept, strict=True):
        for expected, found in zip(expected_steps, found_steps, strict=True):
            assert set(found) == set(expected)
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), name
        moved = [k for k, t in expected_steps[0].items() if not torch.equal(t, expected_steps[-1][k])]
        assert len(moved) > 5, "the steps do something"


def alone(rank: int, world_size: int, init_method: str, variant: str, model_dir: Path) -> None:
    """Each part by itself, when all are there; beside adapters there is no reference."""
    with world(layout := VARIANTS[variant][1], rank, init_method):
        engine = built(variant, layout, model_dir)
        engine.keep_reference()
        step(engine, 0)
        engine.wake(*PARTS)
        memory, before = engine.memory, engine.memory.num_bytes()
        held: list[Part] = [part for part in PARTS if before[part]]
        assert set(held) == set(PARTS) - ({"reference"} if variant == "adapters" else set())
        numbers = {part: whole(engine, part) for part in held}
        assert all(numbers.values())
        for part in held:
            tensors, places = list(tensors_of(engine, part)), list[int]()
            assert before[part] >= sum(tensor.nbytes for tensor in tensors), part
            for again in range(2):
                engine.sleep(part)
                assert memory.num_bytes() == before | {part: 0}
                assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors), part
                hosts = [copy.data_ptr() for copy in vars(memory)["_host"][part].values()]
                assert again == 0 or hosts == places, "host copies are used again"
                places = hosts
                engine.wake(part)
                assert memory.num_bytes() == before
            assert (part == "gradients") == (not places), "gradients need no copy"
            for other in held:
                if other != "gradients":
                    pairs = zip(numbers[other], tensors_of(engine, other), strict=True)
                    assert all(torch.equal(a, b) for a, b in pairs), (part, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_part_sleeps_and_wakes_alone(ranks: RankPool, tmp_path: Path, variant: str) -> None:
    family, layout = VARIANTS[variant]
    ranks.run(layout.world_size, alone, variant, make_model(tmp_path / "model", family=family))


def ledgers(rank: int, world_size: int, init_method: str, model_dir: Path, layout: Layout) -> dict[str, Any]:
    """Bytes by part when built, inside a step, inside the reference and after; and the number of weights."""
    with world(layout, rank, init_method), pytest.MonkeyPatch.context() as patch:
        engine = build(layout, model_dir)
        found: dict[str, Any] = {"weights": sum(p.numel() for _, p in engine.named_parameters())}
        found["built"] = engine.memory.num_bytes()
        engine.keep_reference()
        clip = engine.optimizer.get_grad_norm
        patch.setattr(engine.optimizer, "get_grad_norm", lambda: found.update(step=engine.memory.num_bytes()) or clip())
        patch.setattr(
            engine_module,
            "run_forward",
            lambda *args: found.update(forward=engine.memory.num_bytes()) or run_forward(*args),
        )
        engine.log_probs(make_rows())
        found["policy"] = found["forward"]
        step(engine, 0)
        with engine.reference_weights():
            engine.log_probs(make_rows())
        found["reference"], found["after"] = found["forward"], engine.memory.num_bytes()
        found["largest"] = engine.memory.largest_bytes()
        found["states"] = sum(len(single.optimizer.state) for single in engine.optimizer.chained_optimizers)
    return found


@pytest.mark.parametrize(("bf16", "weight", "main"), [(False, 4, 0), (True, 2, 4)])
def test_bytes_by_part_are_those_of_the_model(
    ranks: RankPool, tmp_path: Path, bf16: bool, weight: int, main: int
) -> None:
    """Per weight: 4 or 2 bytes, a float32 gradient, two running means and under bf16 the main weight, the reference."""
    found = ranks.run(1, ledgers, make_model(tmp_path / "model"), replace(SINGLE, bf16=bf16))[0]
    count = found["weights"]
    nothing = dict.fromkeys(PARTS, 0)
    parameters = nothing | {"parameters": weight * count}
    assert found["built"] == parameters | {"optimizer": main * count}
    assert found["policy"] == found["built"], "the reference is away while the policy computes"
    assert found["step"] == found["built"] | {"gradients": 4 * count}
    stepped = (8 + main) * count + 4 * found["states"]  # and torch's step count of each weight matrix
    assert found["after"] == parameters | {"optimizer": stepped}
    assert found["reference"] == found["after"] | {"reference": pytest.approx(weight * count, rel=1e-3)}  # aligned
    assert found["largest"] == found["reference"] | {"gradients": 4 * count}


def refused(rank: int, world_size: int, init_method: str, model_dir: Path) -> None:
    """What must not be asked of an engine that sleeps, and a step that fails."""
    with world(SINGLE, rank, init_method):
        engine, rows = build(SINGLE, model_dir), make_rows()
        engine.sleep("parameters")
        with pytest.raises(RuntimeError, match="^parameters asleep"):
            engine.log_probs(rows)
        engine.wake("parameters")
        engine.sleep("optimizer")
        with pytest.raises(RuntimeError, match="^optimizer asleep"):
            engine.train_step(rows, parity_case("sft").objective, denominator=1.0)
        engine.wake("optimizer")
        rows.fields["advantages"][20] = np.nan
        with pytest.raises(engine_module.NonFiniteError):
            engine.train_step(rows, parity_case("actor").objective, denominator=9.0)
        assert engine.memory.num_bytes()["gradients"] == 0, "also after a step that was refused"


def test_a_sleeping_engine_computes_nothing(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, refused, make_model(tmp_path / "model"))


def forward_only(rank: int, world_size: int, init_method: str, model_dir: Path) -> None:
    """An engine without optimizer, whose parameters nobody trains."""
    with world(SINGLE, rank, init_method):
        engine = build(SINGLE, model_dir, optimizer=False)
        count = sum(p.numel() for _, p in engine.named_parameters())
        before = engine.log_probs(make_rows())
        assert engine.memory.num_bytes() == dict.fromkeys(PARTS, 0) | {"parameters": 4 * count}
        engine.sleep(*PARTS)
        assert engine.memory.num_bytes() == dict.fromkeys(PARTS, 0)
        engine.wake(*PARTS)
        after = engine.log_probs(make_rows())
        assert np.array_equal(before.values, after.values) and len(before.values) == make_rows().num_targets.sum()


def test_a_model_without_optimizer_sleeps(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, forward_only, make_model(tmp_path / "model"))


def shared(rank: int, world_size: int, init_method: str, model_dir: Path, layout: Layout) -> None:
    """Parameters that others have mapped: they stay, are counted, and nothing else of the engine stays."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        engine.sleep(*PARTS)
        assert engine.memory.num_bytes()["parameters"] == 0
        engine.wake("parameters")
        weights = SharedWeights(engine)
        before, digests = engine.memory.num_bytes()["parameters"], weights.refresh()
        engine.sleep(*PARTS)
        assert engine.memory.num_bytes() == dict.fromkeys(PARTS, 0) | {"parameters": before} and before > 0
        assert not vars(engine.memory)["_host"]["parameters"], "the copy from before they moved is gone"
        assert weights.refresh() == digests
        engine.wake(*PARTS)
        engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0)
        assert weights.refresh() != digests, "and training goes on there"


@pytest.mark.parametrize("layout", [SINGLE, LAYOUTS["DP2-distopt"]])
def test_parameters_in_shared_memory_stay(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    ranks.run(layout.world_size, shared, make_model(tmp_path / "model"), layout)


def resumed(rank: int, world_size: int, init_method: str, model_dir: Path, layout: Layout, target: Path) -> None:
    """Save and load with gradients and reference away, before and after loading in sleeping order."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        engine.keep_reference()
        step(engine, 0)
        engine.sleep(*PARTS)
        engine.wake("parameters", "optimizer")
        save_engine(engine, target)
        assert engine.memory.num_bytes()["gradients"] == 0
        expected = step(engine, 1)
        other = build(layout, model_dir)
        other.keep_reference()
        other.sleep(*PARTS)
        other.wake("parameters", "optimizer")
        load_engine(other, target)
        other.sleep(*PARTS)
        other.wake("parameters", "optimizer")
        assert all(torch.equal(a, b) for a, b in zip(expected, step(other, 1), strict=True))


@pytest.mark.parametrize("layout", [replace(SINGLE, bf16=True), LAYOUTS["DP2-distopt"]])
def test_checkpoints_need_parameters_and_optimizer_alone(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    ranks.run(layout.world_size, resumed, make_model(tmp_path / "model"), layout, tmp_path / "saved")


def held() -> int:
    """Bytes that this process has of its device: allocated on a GPU, resident on a CPU."""
    release_memory()
    return torch.cuda.memory_allocated() if device_kind() == "gpu" else psutil.Process().memory_info().rss


def given_back(function: Callable[[], None]) -> int:
    """How many bytes of its device's memory a call gives back."""
    before = held()
    function()
    return before - held()


def give_back(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path
) -> dict[Part, tuple[int, int]]:
    """For each part, bytes by the ledger and bytes that the device sees, once its host copy exists."""
    found: dict[Part, tuple[int, int]] = {}
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        engine.keep_reference()
        step(engine, 0)
        engine.sleep(*PARTS)
        engine.wake(*PARTS)
        counted = engine.memory.num_bytes()
        for _, parameter in engine.named_parameters():
            parameter.main_grad.fill_(1.0)  # so that the system has given gradients their memory
        for part in PARTS:
            found[part] = counted[part], given_back(lambda part=part: engine.sleep(part))  # type: ignore[misc]
    return found
