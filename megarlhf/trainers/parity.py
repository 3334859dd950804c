"""Does a layout change anything but the speed? A model's results in it against those of one process.

The reference run writes what it computes to a directory; each rank of the layout under test reads the parts that it
holds itself and compares. For every objective: log-probs (or values) of a forward pass, the loss, its gradients, the
movement of the weights in one optimizer step, and log-probs again. Under bfloat16 it is the float32 main weights that
move: the model's own are rounded to more than a step.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarlhf.config.supervised_arguments import ObjectiveName
from megarlhf.data.types import TrainingRows
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.optimizer import main_weight
from megarlhf.engine.schedule import sum_gradients
from megarlhf.formats.safetensors_file import TensorFiles, create_tensor_file
from megarlhf.parallel.device import current_device
from megarlhf.trainers.parity_cases import anchored, fitting, parity_case

QUANTITIES = (
    *("forward", "training", "loss", "metrics", "gradients", "by tensor", "grad norm"),
    *("step", "movement", "after"),
)

Part = tuple[str, tuple[slice, ...], Tensor]  # HF name, this rank's part of it, float32 numbers
Record = Callable[[str, Iterator[Part]], None]  # "gradients" or "step" (how far weights move), and the parts


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
    case = parity_case(name)
    denominator, objective = case.denominator(rows), case.objective
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
        path = directory / f"{quantity}.safetensors"
        create_tensor_file(path, specs)
        with TensorFiles([path], writable=True) as file:
            for hf_name, index, part in parts:
                file.write(hf_name, part, index)

    directory.mkdir()
    specs = engine.weights.tensor_specs(dict.fromkeys(engine.weights.hf_shapes, torch.float32))
    rows = fitting(engine, rows, parity_case(name))
    forward = engine.forward(engine.micro_batches(rows))
    flat = torch.empty(int(rows.num_targets.sum()))
    flat[forward.indices] = torch.from_numpy(forward.values)
    found = _train(engine, name, anchored(rows, flat), record) | {"forward": forward}
    tokens = {}
    for quantity in ("forward", "training", "after"):
        values = torch.from_numpy(found[quantity].values)
        tokens[quantity] = torch.empty(len(flat), *values.shape[1:])
        tokens[quantity][found[quantity].indices] = values
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
        with TensorFiles([self._directory / f"{quantity}.safetensors"]) as file:
            least = 1e-3 * _largest(file)
            for hf_name, index, part in parts:
                expected = file.read(hf_name)
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
    tokens, rows = load_file(directory / "tokens.safetensors"), fitting(engine, rows, parity_case(name))
    forward = engine.forward(engine.micro_batches(rows))
    rows = anchored(rows, tokens["forward"])
    found = _train(engine, name, rows, differences.record) | {"forward": forward}
    for quantity in ("forward", "training", "after"):
        indices, values = found[quantity].indices, torch.from_numpy(found[quantity].values)
        if len(values):  # elsewhere they have no shape
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


def _largest(file: TensorFiles) -> float:
    return max(float(file.read(name).abs().max()) for name in file.places)


def scales(directory: Path) -> dict[str, float]:
    """How large the reference's numbers are, to judge differences by.

    Returns:
        "gradients": largest gradient; "grad norm"; "loss"; "moved": most that the step moves a log-prob or value.
    """
    with TensorFiles([directory / "gradients.safetensors"]) as file:
        gradient = _largest(file)
    tokens = load_file(directory / "tokens.safetensors")
    moved = float((tokens["after"] - tokens["forward"]).abs().max())
    numbers = json.loads((directory / "numbers.json").read_text())
    return {"gradients": gradient, "moved": moved, "loss": numbers["loss"], "grad norm": numbers["grad norm"]}
