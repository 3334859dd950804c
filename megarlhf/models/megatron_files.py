"""Where Megatron checkpoints lie, and which tensors of one are a model's weights."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megarlhf.models.arch import Split
from megarlhf.models.conversion import LATEST
from megarlhf.models.cuts import CutModel, GlobalWeight, Region
from megarlhf.models.torch_dist import METADATA, TorchDistReader

HF_CONFIG = "hf_config"
_NUMBERED = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class MegatronCheckpoint:
    """A checkpoint that was found."""

    directory: Path  # with .metadata
    iteration: str  # a number, "release", or the directory's name where nothing says
    source: str  # option and value that it was found by, for messages


def find_checkpoint(load: str, role: str) -> MegatronCheckpoint:
    """The checkpoint that `load` means: DIR or DIR@iteration of Megatron-LM's layout, a run's directory, or one step.

    Args:
        role: which model of a run's checkpoint, "actor" or "critic".
    Raises:
        ValueError: there is none.
    """
    path, source, iteration = Path(load), f"load={load}", ""
    if not path.exists() and "@" in load:
        name, _, iteration = load.rpartition("@")
        path = Path(name)
    if not path.is_dir():
        raise ValueError(f"{source}; no such directory")
    if (path / "checkpoints").is_dir():
        path /= "checkpoints"
    if not iteration and (path / LATEST).is_file():
        iteration = (path / LATEST).read_text().strip()
    if iteration and iteration != "release" and not iteration.isdecimal():
        raise ValueError(f"{source}; iteration {iteration!r} is neither a number nor release")
    if iteration:
        path /= iteration if iteration == "release" else f"iter_{int(iteration):07d}"
    directory = path / role if (path / role).is_dir() else path
    if not (directory / METADATA).is_file():
        raise ValueError(
            f"{source}; {directory} has no {METADATA}, so it is no checkpoint in Megatron-Core's torch_dist format: give "
            f"a directory with {LATEST}, or one step of it"
        )
    return MegatronCheckpoint(directory=directory, iteration=iteration or path.name, source=source)


def hf_directory(checkpoint: MegatronCheckpoint, hf_model: str | None, role: str) -> Path:
    """Where the configuration and tokenizer of a checkpoint's model are: hf_model, hf_config/, or the run's pretrain.

    Raises:
        ValueError: nowhere.
    """
    if hf_model is not None:
        return Path(hf_model)
    for parent in (checkpoint.directory, *checkpoint.directory.absolute().parents[:3]):
        if (parent / HF_CONFIG).is_dir():
            return parent / HF_CONFIG
        if (parent / "config.yaml").is_file():
            model = yaml.safe_load((parent / "config.yaml").read_text())["model"]
            pretrain = (role == "critic" and model.get("critic_pretrain")) or model["pretrain"]
            if Path(pretrain).is_dir():
                return Path(pretrain)
            raise ValueError(f"{checkpoint.source}; its run's pretrain={pretrain} is gone: give --hf-model")
    raise ValueError(
        f"{checkpoint.source}; neither {HF_CONFIG}/ nor a run's config.yaml says what model it is: give --hf-model"
    )


def locate(model: CutModel, reader: TorchDistReader) -> list[GlobalWeight]:
    """The model's weights where this checkpoint has them.

    Layer norms may carry the names of either layer implementation, and layers be stacked in one tensor or numbered.

    Raises:
        ValueError: missing, unknown and wrongly shaped tensors, all of them named.
    """
    found, problems = [], []
    for weight in model.weights:
        place = next((form for form in _forms(weight, model.names.hf.num_hidden_layers) if form.key in reader.tensors), None)
        if place is None:
            problems.append(f"missing {weight.key}")
            continue
        size, expected = tuple(reader.tensors[place.key].size), place.tensor_shape
        if weight.weight.split is Split.VOCAB:  # padded to any number of rows
            rows = model.names.hf.vocab_size
            place = replace(place, region=replace(place.region, shape=(rows, *place.shape[1:])))
            expected = (max(rows, size[0]), *expected[1:])
        if size != expected:
            problems.append(f"{place.key} has shape {size}, the configuration says {expected}")
        found.append(place)
    keys = {place.key for place in found}
    unknown = [k for k in reader.tensors if k not in keys and not k.startswith(("optimizer.", "chained_"))]
    problems = list(dict.fromkeys(problems)) + [f"unknown {key}" for key in unknown]
    if problems:
        raise ValueError(f"{reader.source}; it does not hold this {model.names.arch.hf_class}: " + "; ".join(problems))
    return found


def _forms(weight: GlobalWeight, num_layers: int) -> Iterator[GlobalWeight]:
    """The weight under each key that Megatron-Core may store it."""
    yield weight
    layer = _NUMBERED.match(weight.weight.megatron[0])
    if layer is None:
        return
    for key in (weight.key, *weight.weight.megatron):
        region, shape, is_numbered = weight.region, weight.tensor_shape, _NUMBERED.match(weight.key) is not None
        short = _NUMBERED.sub("decoder.layers.", key)
        named = _NUMBERED.sub(layer[0], key) if _NUMBERED.match(key) else key.replace("decoder.layers.", layer[0], 1)
        if is_numbered:
            stacked = replace(
                weight,
                key=short,
                tensor_shape=(num_layers, *shape),
                region=Region(offset=(int(layer[1]), *region.offset), shape=(1, *region.shape)),
                num_stacked=weight.num_stacked + 1,
            )
            yield from (replace(weight, key=named), stacked)
        else:
            numbered = replace(
                weight,
                key=named,
                tensor_shape=shape[1:],
                region=Region(offset=region.offset[1:], shape=region.shape[1:]),
                num_stacked=weight.num_stacked - 1,
            )
            yield from (replace(weight, key=short), numbered)
