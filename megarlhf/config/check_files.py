"""What a run finds on disk, checked without loading a model: checkpoints, data, reward code, earlier runs.

Every function returns sentences for the user and raises nothing. os.path is asked what is there, which
says no to names that the system refuses.
"""

import ast
import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
DATA_KINDS = f"give a {', '.join(DATA_SUFFIXES)} file or a directory saved with datasets"


def read_model(key: str, path: str, architectures: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint's config.json, empty where it cannot be read, and what keeps the checkpoint from being loaded.

    Args:
        key: option that names the checkpoint.
        path: its directory.
        architectures: class names that may stand under `architectures` in config.json.
    """
    directory = Path(path)
    if not os.path.isdir(path):
        return {}, [
            f"{key}={path} is not a local directory (models are loaded from a directory with config.json and "
            f"*.safetensors; nothing is downloaded): give the path of a downloaded checkpoint"
        ]
    config, errors = _read_object(directory / "config.json", f"{key}={path}")
    errors += _weight_errors(key, directory)
    found = config.get("architectures")
    if config and not any(name in architectures for name in (found if isinstance(found, list) else [])):
        errors.append(
            f"{key}={path} has architectures={found}; supported are {', '.join(architectures)}: use another model"
        )
    return config, errors


def _read_object(path: Path, owner: str) -> tuple[dict[str, Any], list[str]]:
    """A JSON object from a file that must be there."""
    if not os.path.isfile(path):
        return {}, [f"{owner} has no {path.name}: give the directory of a Hugging Face checkpoint"]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{owner} has a {path.name} that cannot be read as JSON ({error}): repair or download it again"]
    if not isinstance(value, dict):
        return {}, [f"{owner} has a {path.name} that is not a JSON object: repair or download it again"]
    return value, []


def _weight_errors(key: str, directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if any(directory.glob("*.safetensors")):
            return []
        return [f"{key}={directory} has no *.safetensors (no other weights are loaded): convert with save_pretrained"]
    content, errors = _read_object(index, f"{key}={directory}")
    shards = content.get("weight_map")
    if errors or not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        return errors or [f"{key}={directory} has an {index.name} without weight_map, file of each tensor: repair it"]
    missing = sorted({shard for shard in shards.values() if not (directory / shard).is_file()})
    if not missing:
        return []
    return [f"{key}={directory} lacks {', '.join(missing)}, which {index.name} names: download it again"]


def tokenizer_errors(key: str, path: str, *, apply_chat_template: bool, chat_template: str | None) -> list[str]:
    """Tokenizer files that are missing, and a chat template that is asked for and is not there.

    Args:
        key: option that names the tokenizer's directory `path`.
        apply_chat_template: prompts are to be rendered with a chat template.
        chat_template: template that replaces the tokenizer's own.
    """
    directory = Path(path)
    if not os.path.isdir(path):
        return [f"{key}={path} is not a local directory (nothing is downloaded): give the directory of a tokenizer"]
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return [f"{key}={path} has no tokenizer (one of {', '.join(TOKENIZER_FILES)}): set tokenizer to its directory"]
    if not apply_chat_template or chat_template is not None or (directory / "chat_template.jinja").is_file():
        return []
    settings, errors = _read_object(directory / "tokenizer_config.json", f"{key}={path}")
    if settings.get("chat_template") or (errors and (directory / "tokenizer_config.json").is_file()):
        return errors
    return [f"apply_chat_template=True but {key}={path} has no chat template: set tokenizer_chat_template"]


def same_vocabulary_errors(key: str, path: str, other: str) -> list[str]:
    """Whether two model directories give each token the same id, as far as their tokenizer.json files tell.

    Directories without a readable tokenizer.json are not compared.
    """
    ours, theirs = (_vocabulary(Path(directory) / "tokenizer.json") for directory in (path, other))
    if ours is None or theirs is None or ours == theirs:
        return []
    return [
        f"{key}={path} has a tokenizer of {len(ours)} tokens that differs from the {len(theirs)} tokens of {other} "
        f"(the critic reads the actor's token ids): use a checkpoint with the same tokenizer"
    ]


def smaller_vocabulary_errors(key: str, config: dict[str, Any], actor: dict[str, Any]) -> list[str]:
    """Whether a model that reads the actor's responses knows every token that the actor can generate.

    Args:
        key: option that names the model, for example critic_pretrain=DIR.
        config: its config.json; without a number of its own under vocab_size it is not compared.
        actor: the actor's config.json.
    """
    ours, actors = config.get("vocab_size"), actor.get("vocab_size")
    if not isinstance(ours, int) or not isinstance(actors, int) or ours >= actors:
        return []
    return [
        f"{key} has vocab_size={ours}, less than vocab_size={actors} of pretrain (the actor can generate any token "
        f"below its own): use a checkpoint with at least {actors}, or resize its embedding"
    ]


def file_for_text_errors(key: str, value: str | None) -> list[str]:
    """An option that takes a text and got the path of a file."""
    try:
        if value is None or not Path(value).is_file():
            return []
    except (OSError, ValueError):  # too long for a path, or with a character that none can have
        return []
    return [f"{key}={value} is a file, and {key} is the text itself: give what is in the file"]


def _vocabulary(path: Path) -> dict[str, int] | None:
    content, _ = _read_object(path, str(path))
    try:
        entries = content["model"]["vocab"]  # {token: id}, or [[token, score], ...] in order of ids
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        return (entries if isinstance(entries, dict) else {token: i for i, (token, _) in enumerate(entries)}) | added
    except (KeyError, TypeError, ValueError):
        return None  # no tokenizer.json, or of a kind without a plain vocabulary


def data_errors(key: str, path: str, columns: dict[str, str]) -> list[str]:
    """A data file that cannot be read, and columns that its first row lacks.

    Args:
        key: option that names the data.
        path: .jsonl, .json, .csv or .parquet file, or a directory saved with datasets.
        columns: option -> column it names, for each column that must be there.
    """
    source = Path(path)
    if not os.path.exists(path):
        return [f"{key}={path} does not exist: {DATA_KINDS}"]
    if source.is_file() and source.suffix.lower() not in DATA_SUFFIXES:
        return [f"{key}={path} is of no known kind: {DATA_KINDS}"]
    try:
        keys = _first_row_keys(source)
    # json, csv, pyarrow and datasets raise many kinds for files that are broken, KeyError and RecursionError too.
    except Exception as error:
        return [f"{key}={path} cannot be read ({type(error).__name__}: {error})"]
    if not keys:
        return [f"{key}={path} has no rows: nothing to train or evaluate on"]
    return [
        f"{option}={column} is not a column of {key}={path} (it has {', '.join(keys)}): set {option} to one of them"
        for option, column in columns.items()
        if column not in keys
    ]


def _first_row_keys(source: Path) -> list[str]:
    """Column names, none where there are no rows. Raises what the libraries raise where the data is broken."""
    if source.is_dir():
        return _saved_columns(source)
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        from pyarrow import parquet  # takes a second, and only Parquet needs it

        file = parquet.ParquetFile(source)
        return list(file.schema_arrow.names) if file.metadata.num_rows else []
    with source.open(encoding="utf-8-sig", newline="") as file:
        if suffix == ".csv":
            csv.field_size_limit(sys.maxsize)  # as data/loading.py reads it
            return list(next(csv.DictReader(file, strict=True), {}))
        if suffix == ".jsonl":
            line = next((line for line in file if line.strip()), None)
            rows = [] if line is None else [json.loads(line)]
        else:
            rows = json.load(file)
    if not isinstance(rows, list) or (rows and not isinstance(rows[0], dict)):
        raise ValueError("it does not hold objects with named fields")
    return list(rows[0]) if rows else []


def _saved_columns(directory: Path) -> list[str]:
    """Columns of a directory saved with datasets, from its description: importing datasets takes seconds."""
    splits, description = directory / "dataset_dict.json", directory / "dataset_info.json"
    if splits.is_file():
        raise ValueError(
            f"it holds several splits, {', '.join(json.loads(splits.read_text())['splits'])}: give the directory of one"
        )
    if not description.is_file():
        raise ValueError(f"it has no {description.name}, which datasets' save_to_disk writes")
    features = json.loads(description.read_text()).get("features")
    if not isinstance(features, dict):
        raise ValueError(f"its {description.name} names no columns")
    return list(features)


def reward_function_errors(path: str) -> list[str]:
    """A reward file that is missing or is not Python. Whether it has a reward_func shows when it is loaded."""
    if not path.endswith(".py"):
        return [f"reward_function={path} does not end in .py: give a Python file"]
    try:
        ast.parse(Path(path).read_bytes(), filename=path)
    except OSError as error:
        return [f"reward_function={path} cannot be read ({error.strerror}): give a Python file"]
    except (SyntaxError, ValueError) as error:
        return [f"reward_function={path} is not Python ({error})"]
    return []


def load_errors(path: str) -> list[str]:
    """A run directory that holds no complete checkpoint to continue from."""
    checkpoints = Path(path) / "checkpoints"
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    if not os.path.isdir(checkpoints):
        return [f"load={path} has no checkpoints directory: give the run directory (save) of an earlier run"]
    if not tracker.is_file():
        return [f"load={path} has no checkpoints/{tracker.name}: no checkpoint was completed: start without load"]
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        return [f"load={path} has {text!r} in checkpoints/{tracker.name}, not a step: name a saved one"]
    directory = checkpoints / f"iter_{int(text):07d}"
    if directory.is_dir():
        return []
    return [f"load={path} lacks checkpoints/{directory.name}, which {tracker.name} names: name a saved step there"]
