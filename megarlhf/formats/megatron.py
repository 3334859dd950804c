"""Where Megatron checkpoints lie, and the Hugging Face files that belong to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megarlhf.formats.run_checkpoints import LATEST, iteration_directory
from megarlhf.formats.torch_dist import METADATA

HF_CONFIG = "hf_config"
RELEASE = "release"  # in place of an iteration: weights that no training step has changed


@dataclass(frozen=True, kw_only=True)
class MegatronCheckpoint:
    """A checkpoint that was found."""

    directory: Path  # with .metadata
    iteration: str  # a number, "release", or the directory's name where nothing says
    source: str  # option and value that it was found by, for messages


@dataclass(frozen=True, kw_only=True)
class HFFiles:
    """Where a checkpoint's model has its Hugging Face files."""

    directory: Path  # with config.json
    tokenizer: Path | None = None  # directory of the tokenizer, of a run alone
    chat_template: str | None = None  # --tokenizer_chat_template of the run


def find_checkpoint(load: str, role: str) -> MegatronCheckpoint:
    """The checkpoint that `load` means: DIR or DIR@iteration of Megatron-LM's layout, a run's directory, or one step.

    Args:
        role: which model of a run's checkpoint, by the name of its role.
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


def hf_files(checkpoint: MegatronCheckpoint, hf_model: str | None, options: Sequence[str]) -> HFFiles:
    """What goes with a checkpoint's weights: of hf_model, of hf_config/, or what the run was trained with.

    Args:
        options: of the run, that name the directory that the model started from; the first that was given counts.
    Raises:
        ValueError: nowhere.
    """
    if hf_model is not None:
        return HFFiles(directory=Path(hf_model))
    found = _companions(checkpoint, options)
    if found is None:
        raise ValueError(
            f"{checkpoint.source}; neither {HF_CONFIG}/ nor a run's config.yaml says what model it is: give --hf-model"
        )
    for name, path in {"pretrain": found.directory, "tokenizer": found.tokenizer}.items():
        if path is not None and not path.is_dir():
            raise ValueError(f"{checkpoint.source}; its run's {name}={path} is gone: give --hf-model")
    return found


def run_pretrain(checkpoint: MegatronCheckpoint, options: Sequence[str]) -> Path | None:
    """What the run of a checkpoint started from, whether it is still there or not; None for other checkpoints."""
    found = _companions(checkpoint, options)
    return found.directory if found is not None and found.tokenizer is not None else None


def _companions(checkpoint: MegatronCheckpoint, options: Sequence[str]) -> HFFiles | None:
    """The nearest hf_config/, or what the nearest run was trained with."""
    for parent in (checkpoint.directory, *checkpoint.directory.absolute().parents[:3]):
        if (parent / HF_CONFIG).is_dir():
            return HFFiles(directory=parent / HF_CONFIG)
        found = _run_files(parent / "config.yaml", options)
        if found is not None:
            return found
    return None


def _run_files(path: Path, options: Sequence[str]) -> HFFiles | None:
    """What a run's configuration names; None where there is no such file or it is some other program's."""
    try:
        config = yaml.safe_load(path.read_text())
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return None
    parts = config if isinstance(config, dict) else {}
    model, data = (part if isinstance(part, dict) else {} for part in (parts.get("model"), parts.get("data")))
    pretrain, template = model.get("pretrain"), data.get("tokenizer_chat_template")
    if not isinstance(pretrain, str):
        return None
    option = next(option for option in (*options, "pretrain") if model.get(option))
    return HFFiles(
        directory=Path(_first(option, model[option])),
        tokenizer=Path(model.get("tokenizer") or pretrain),
        chat_template=template if isinstance(template, str) else None,
    )


def _first(option: str, value: str) -> str:
    """The directory that an option names; a critic starts from the first of several reward models."""
    return value.split(",")[0].strip() if option == "reward_pretrain" else value
