"""Does a layout change anything but the speed? A model's results in it against those of one process.

The reference run writes what it computes to a directory; each rank of the layout under test reads the parts that it
holds itself and compares. For every objective: log-probs (or values) of a forward pass, the loss, its gradients, the
movement of the weights in one optimizer step, and log-probs again. Under bfloat16 it is the float32 main weights that
move: the model's own are rounded to more than a step.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarlhf.data.planning import prompt_units
from megarlhf.data.types import TrainingRows, training_rows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Objective
from megarlhf.engine.optimizer import main_weight
from megarlhf.engine.schedule import sum_gradients
from megarlhf.formats.safetensors_file import TensorFile
from megarlhf.parallel.device import current_device
from megarlhf.trainers.policy import PolicyLossOptions, policy_objective
from megarlhf.trainers.sft import sft_objective
from megarlhf.trainers.value import value_objective

ObjectiveName = Literal["sft", "actor", "critic"]
OBJECTIVES: tuple[ObjectiveName, ...] = ("sft", "actor", "critic")
QUANTITIES = (
    *("forward", "training", "loss", "metrics", "gradients", "by tensor", "grad norm"),
    *("step", "movement", "after"),
)

Part = tuple[str, tuple[slice, ...], Tensor]  # HF name, this rank's part of it, float32 numbers
Record = Callable[[str, Iterator[Part]], None]  # "gradients" or "step" (how far weights move), and the parts


def parity_rows(
    vocab_size: int, *, groups: int = 3, samples: int = 3, longest: int = 12, seed: int = 5
) -> TrainingRows:
    """Groups of samples with equal prompts, ragged responses and every field that a loss may ask for.

    `old_log_probs` and `ref_log_probs` are distances from the model's own, to be added by `anchored`.

    Args:
        longest: no response has more tokens than this, nor a prompt much more.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    ids: list[list[int]] = []
    prompts, units = list[int](), list[int]()
    fields: dict[str, list[Tensor]] = {}
    for group in range(groups):
        prompt = draw(3, vocab_size, 3 + 2 * group * max(1, longest // 12))
        for length in draw(2, longest, samples):
            for name in ("advantages", "old_log_probs", "ref_log_probs", "old_values", "returns"):
                fields.setdefault(name, []).append(torch.randn(length, generator=generator))
            fields.setdefault("weights", []).append(torch.full((length,), 1.0 / length))
            ids.append([*prompt, *draw(3, vocab_size, length)])
            prompts.append(len(prompt))
            units.append(group)
    return training_rows(ids, prompts, unit_ids=units, fields=fields)


def anchored(rows: TrainingRows, log_probs: Tensor) -> TrainingRows:
    """Rows with old and reference log-probs near the model's own, where ratios are moderate and some are clipped.

    Args:
        log_probs: [targets] of the model.
    """
    names = ("old_log_probs", "ref_log_probs")
    return rows.with_fields({name: rows.fields[name] + log_probs.numpy() for name in names})


def fitting(engine: MegatronEngine, rows: TrainingRows) -> TrainingRows:
    """Rows whose units fit into the engine's micro-batches.

    Groups that share a prompt's computation are cut where they must be; where nothing is shared each row is alone.
    """
    sizes = rows.lengths, rows.prompt_lengths, rows.unit_ids
    return replace(rows, unit_ids=prompt_units(*sizes, num_ranks=engine.ranks.dp_size, packing=engine.packing))


def parity_objective(name: ObjectiveName) -> Objective:
    """A role's loss with every term switched on."""
    if name == "sft":
        return sft_objective()
    if name == "critic":
        return value_objective(value_clip=0.2)
    return policy_objective(
        PolicyLossOptions(
            clip_eps_low=0.2,
            clip_eps_high=0.3,
            dual_clip=3.0,
            entropy_coef=0.01,
            kl_loss_coef=0.05,
            kl_estimator="k3",
        )
    )


def parity_denominator(name: ObjectiveName, rows: TrainingRows) -> float:
    """What the trainers divide this loss by: targets for supervised training, else the rows' own weights add to one."""
    return float(rows.num_targets.sum() if name == "sft" else len(rows))


@contextmanager
def whole_gradients(engine: MegatronEngine) -> Iterator[None]:
    """Inside the block gradients are left whole on every rank, where the distributed optimizer would leave shards."""

    def finalize(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        sum_gradients(model, num_tokens, **(kwargs | {"force_all_reduce": True}))

    engine.config.finalize_model_grads_func = finalize
    try:
        yield
    finally:
        engine.config.finalize_model_grads_func = sum_gradients


def hf_parts(engine: MegatronEngine, *, gradients: bool) -> Iterator[Part]:
    """This rank's gradients or weights under their HF names."""
    return _parts(engine, lambda p: p.main_grad if gradients else p.data, buffers=not gradients)


def main_parts(engine: MegatronEngine) -> Iterator[Part]:
    """The float32 weights that the optimizer steps, whole parameters; every rank goes through all of them."""
    return _parts(engine, lambda p: main_weight(engine.optimizer, p), buffers=False)


def _parts(engine: MegatronEngine, tensor_of: Callable[[Any], Tensor], *, buffers: bool) -> Iterator[Part]:
    engine.finish_param_gather()
    weights = engine.weights
    shapes = weights.hf_shapes
    for local in weights.local:
        if local.exported and (buffers or not local.weight.buffer):
            for shard in weights.shards(local, tensor_of(local.param)):
                whole = zip(shapes[shard.hf_name], shard.index, strict=True)
                shape = tuple(len(range(size)[part]) for size, part in whole)
                yield shard.hf_name, shard.index, shard.view.float().reshape(shape)


def _train(engine: MegatronEngine, name: ObjectiveName, rows: TrainingRows, record: Record) -> dict[str, Any]:
    """What is compared after the forward pass; gradients and weights go through `record` while they exist."""
    denominator, objective = parity_denominator(name, rows), parity_objective(name)
    with whole_gradients(engine):
        batches = engine.micro_batches(rows)
        loss, metrics, outputs = engine.accumulate_gradients(batches, objective, denominator=denominator)
    found: dict[str, Any] = {"loss": loss, "metrics": metrics, "training": outputs}
    record("gradients", hf_parts(engine, gradients=True))
    before = [part.to("cpu", copy=True) for _, _, part in main_parts(engine)]
    found["grad norm"] = engine.train_step(rows, objective, denominator=denominator).grad_norm
    after = zip(main_parts(engine), before, strict=True)
    record("step", ((hf_name, index, part.cpu() - old) for (hf_name, index, part), old in after))
    return found | {"after": engine.forward(engine.micro_batches(rows))}


def write_reference(engine: MegatronEngine, name: ObjectiveName, rows: TrainingRows, directory: Path) -> None:
    """What one process computes, for `compare`; the engine takes a step."""

    def record(quantity: str, parts: Iterator[Part]) -> None:
        with TensorFile.create(directory / f"{quantity}.safetensors", specs) as file:
            for hf_name, index, part in parts:
                file.view(hf_name)[index] = part

    directory.mkdir()
    specs = engine.weights.tensor_specs(dict.fromkeys(engine.weights.hf_shapes, torch.float32))
    rows = fitting(engine, rows)
    forward = engine.forward(engine.micro_batches(rows))
    flat = torch.empty(int(rows.num_targets.sum()))
    flat[forward.indices] = torch.from_numpy(forward.values)
    found = _train(engine, name, anchored(rows, flat), record) | {"forward": forward}
    tokens = {quantity: torch.empty_like(flat) for quantity in ("forward", "training", "after")}
    for quantity, whole in tokens.items():
        whole[found[quantity].indices] = torch.from_numpy(found[quantity].values)
    save_file(tokens, directory / "tokens.safetensors")
    numbers = {quantity: found[quantity] for quantity in ("loss", "metrics", "grad norm")}
    (directory / "numbers.json").write_text(json.dumps(numbers))


class _Differences:
    """This rank's largest difference to the reference in `directory` for each of QUANTITIES."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._worst = dict.fromkeys(QUANTITIES, 0.0)
        self._squares = torch.zeros(2, dtype=torch.float64)  # summed: of the movement's difference, of the movement

    def note(self, quantity: str, difference: Tensor) -> None:
        if difference.numel():
            worst = float(difference.abs().nan_to_num(nan=torch.inf).max())
            self._worst[quantity] = max(self._worst[quantity], worst)

    def record(self, quantity: str, parts: Iterator[Part]) -> None:
        with TensorFile(self._directory / f"{quantity}.safetensors") as file:
            least = 1e-3 * _largest(file)
            for hf_name, index, part in parts:
                expected = file.view(hf_name)
                difference = part.cpu() - expected[index]
                self.note(quantity, difference)
                if quantity == "gradients":
                    self.note("by tensor", difference / max(float(expected.abs().max()), least))
                else:
                    pair = (difference, expected[index])
                    self._squares += torch.stack([tensor.double().square().sum() for tensor in pair])

    def everywhere(self) -> dict[str, float]:
        """The largest of all ranks; every rank calls it."""
        squares = self._squares.to(current_device())
        dist.all_reduce(squares)
        self.note("movement", (squares[0] / squares[1]).sqrt())
        worst = [self._worst[quantity] for quantity in QUANTITIES]
        largest = torch.tensor(worst, dtype=torch.float64, device=current_device())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return dict(zip(QUANTITIES, largest.tolist(), strict=True))


def compare(engine: MegatronEngine, name: ObjectiveName, rows: TrainingRows, directory: Path) -> dict[str, float]:
    """Largest difference to the reference of each of QUANTITIES, equal on every rank; the engine takes a step.

    "by tensor" is a gradient's difference relative to the largest gradient of its tensor (at least a thousandth of the
    model's largest: some gradients are nothing but rounding). "movement" is the length of the movement's difference
    relative to that of the movement: 1 where no step is taken, 2 for a step the other way. The others are absolute. A
    result that is not a number counts as infinitely far off. Router metrics are left out: they count padding.
    """
    differences = _Differences(directory)
    tokens, rows = load_file(directory / "tokens.safetensors"), fitting(engine, rows)
    forward = engine.forward(engine.micro_batches(rows))
    rows = anchored(rows, tokens["forward"])
    found = _train(engine, name, rows, differences.record) | {"forward": forward}
    for quantity in ("forward", "training", "after"):
        indices, values = found[quantity].indices, torch.from_numpy(found[quantity].values)
        differences.note(quantity, values - tokens[quantity][indices])
        seen = torch.zeros(len(tokens[quantity]), device=current_device())
        if engine.ranks.holds_results:
            seen[indices] += 1
        dist.all_reduce(seen)
        differences.note(quantity, torch.where(seen == 1, 0.0, torch.inf))  # each target is one replica's
    numbers = json.loads((directory / "numbers.json").read_text())
    for quantity in ("loss", "grad norm"):
        differences.note(quantity, torch.tensor(found[quantity] - numbers[quantity]))
    for metric, value in numbers["metrics"].items():
        if not metric.startswith("moe_"):
            differences.note("metrics", torch.tensor(found["metrics"][metric] - value))
    return differences.everywhere()


def _largest(file: TensorFile) -> float:
    return max(float(file.view(name).abs().max()) for name in file.names)


def scales(directory: Path) -> dict[str, float]:
    """How large the reference's numbers are, to judge differences by.

    Returns:
        "gradients": largest gradient; "grad norm"; "loss"; "moved": most that the step moves a log-prob or value.
    """
    with TensorFile(directory / "gradients.safetensors") as file:
        gradient = _largest(file)
    tokens = load_file(directory / "tokens.safetensors")
    moved = float((tokens["after"] - tokens["forward"]).abs().max())
    numbers = json.loads((directory / "numbers.json").read_text())
    return {"gradients": gradient, "moved": moved, "loss": numbers["loss"], "grad norm": numbers["grad norm"]}
