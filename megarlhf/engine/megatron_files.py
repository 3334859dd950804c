"""Where Megatron checkpoints lie, and the Hugging Face files that belong to them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megarlhf.engine.checkpoint_files import LATEST, iteration_directory
from megarlhf.models.torch_dist import METADATA

HF_CONFIG = "hf_config"
RELEASE = "release"  # in place of an iteration: weights that no training step has changed


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
    if iteration and iteration != RELEASE and not iteration.isdecimal():
        raise ValueError(f"{source}; iteration {iteration!r} is neither a number nor {RELEASE}")
    if iteration:
        path = path / RELEASE if iteration == RELEASE else iteration_directory(path, int(iteration))
    directory = path / role if (path / role).is_dir() else path
    if not (directory / METADATA).is_file():
        raise ValueError(
            f"{source}; {directory} has no {METADATA}, so it is no checkpoint in Megatron-Core's torch_dist format: "
            f"give a directory with {LATEST}, or one step of it"
        )
    return MegatronCheckpoint(directory=directory, iteration=iteration or path.name, source=source)


def hf_directory(checkpoint: MegatronCheckpoint, hf_model: str | None, role: str) -> Path:
    """Where the configuration and tokenizer of a checkpoint's model are: hf_model, hf_config/, or the run's pretrain.

    Raises:
        ValueError: nowhere.
    """
    if hf_model is not None:
        return Path(hf_model)
    found, is_pretrain = _companions(checkpoint, role)
    if found is None:
        raise ValueError(
            f"{checkpoint.source}; neither {HF_CONFIG}/ nor a run's config.yaml says what model it is: give --hf-model"
        )
    if is_pretrain and not found.is_dir():
        raise ValueError(f"{checkpoint.source}; its run's pretrain={found} is gone: give --hf-model")
    return found


def run_pretrain(checkpoint: MegatronCheckpoint, role: str) -> Path | None:
    """The pretrain of the run that a checkpoint is of, whether it is still there or not; None for other checkpoints."""
    found, is_pretrain = _companions(checkpoint, role)
    return found if is_pretrain else None


def _companions(checkpoint: MegatronCheckpoint, role: str) -> tuple[Path | None, bool]:
    """The nearest hf_config/, or the pretrain of the nearest run and True."""
    for parent in (checkpoint.directory, *checkpoint.directory.absolute().parents[:3]):
        if (parent / HF_CONFIG).is_dir():
            return parent / HF_CONFIG, False
        model = _run_model(parent / "config.yaml")
        if model is not None:
            return Path((role == "critic" and model.get("critic_pretrain")) or model["pretrain"]), True
    return None, False


def _run_model(path: Path) -> dict[str, Any] | None:
    """The `model` part of a run's configuration; None where there is no such file or it is some other program's."""
    try:
        config = yaml.safe_load(path.read_text())
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return None
    model = config.get("model") if isinstance(config, dict) else None
    return model if isinstance(model, dict) and isinstance(model.get("pretrain"), str) else None
