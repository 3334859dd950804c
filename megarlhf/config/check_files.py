"""What a run finds on disk, as far as it can be checked without PyTorch: whether things are there, and config.json.

What is in data, weights, tokenizers, checkpoints and reward code is checked where it is read: cli/run_ppo and
cli/run_supervised do so before anything starts, and report all of it together. Every function here returns sentences
for the user and raises nothing. os.path is asked what is there, which says no to names that the system refuses.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megarlhf.config.roles import LISTS
from megarlhf.formats.data_names import name_errors, set_errors
from megarlhf.formats.json_files import read_json_object

_CHECKPOINT = (os.path.isdir, "is not a local directory (nothing is downloaded): give that of a downloaded checkpoint")
_DATA = dict.fromkeys(("prompt_data", "pretrain_data", "dataset", "eval_dataset"), name_errors)
_DATA |= {"eval_data": set_errors}
_PLACES: dict[str, tuple[Callable[[str], bool], str]] = {
    **dict.fromkeys(
        ("pretrain", "critic_pretrain", "reward_pretrain", "ref_pretrain", "teacher_model", "tokenizer"), _CHECKPOINT
    ),
    "ta_prompt": (os.path.isfile, "is not a file: give that of the text"),
    "load": (os.path.isdir, "is not a directory: give the run directory (save) of an earlier run"),
    "reward_function": (
        lambda path: path.endswith(".py") and os.path.isfile(path),
        "is not a Python file: give one that ends in .py",
    ),
}


def place_errors(options: Mapping[str, Any]) -> list[str]:
    """Options, values by name, that name a file or directory which is not there."""
    errors = [
        f"{key}={path} {said}"
        for key, (is_there, said) in _PLACES.items()
        if options.get(key) is not None
        for path in (options[key].split(",") if key in LISTS else [options[key]])
        if not is_there(path.strip())
    ]
    return errors + [error for key, found in _DATA.items() if options.get(key) for error in found(key, options[key])]


def read_model(key: str, path: str) -> tuple[dict[str, Any], list[str]]:
    """config.json of the checkpoint that option `key` names, empty where it cannot be read, and what is wrong with it.

    A directory that is not there is of place_errors.
    """
    try:
        return (read_json_object(Path(path) / "config.json", f"{key}={path}") if os.path.isdir(path) else {}), []
    except ValueError as error:
        return {}, [str(error)]


def has_other_tokens(path: str, tokenizer: str) -> bool:
    """Whether the tokenizer.json of two directories are there, can be read and differ."""
    ours, theirs = _vocabularies(path, tokenizer)
    return ours is not None and theirs is not None and ours != theirs


def _vocabularies(*directories: str) -> list[dict[str, int] | None]:
    return [_vocabulary(Path(directory) / "tokenizer.json") for directory in directories]


def token_errors(
    key: str,
    path: str,
    tokenizer: str,
    model: Mapping[str, Any],
    actor: Mapping[str, Any],
    *,
    cure: str = "use a checkpoint with the same tokenizer",
) -> list[str]:
    """Whether another model reads the actor's (or the student's) tokens as that means them.

    Args:
        key: option that names its directory `path`.
        tokenizer: directory of the actor's tokenizer; without a readable tokenizer.json on both sides these are not
            compared.
        model, actor: config.json of either; sizes that are absent are not compared.
        cure: what to do where the tokenizers differ.
    """
    errors = []
    ours, theirs = _vocabularies(path, tokenizer)
    if ours is not None and theirs is not None and ours != theirs:
        errors.append(
            f"{key}={path} has a tokenizer of {len(ours)} tokens that differs from the {len(theirs)} tokens of "
            f"{tokenizer} (it reads the same token ids): {cure}"
        )
    size, actors = model.get("vocab_size"), actor.get("vocab_size")
    if isinstance(size, int) and isinstance(actors, int) and size < actors:
        errors.append(
            f"{key}={path} has vocab_size={size}, less than vocab_size={actors} of pretrain (every token "
            f"below that may come): use a checkpoint with at least {actors}, or resize its embedding"
        )
    return errors


def _vocabulary(path: Path) -> dict[str, int] | None:
    try:
        content = read_json_object(path, str(path))
        entries = content["model"]["vocab"]  # {token: id}, or [[token, score], ...] in order of ids
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        return (entries if isinstance(entries, dict) else {token: i for i, (token, _) in enumerate(entries)}) | added
    except (KeyError, TypeError, ValueError):
        return None  # no tokenizer.json, or of a kind without a plain vocabulary


def file_for_text_errors(key: str, value: str | None) -> list[str]:
    """An option that takes a text and got the path of a file."""
    if value is None or not os.path.isfile(value):
        return []
    return [f"{key}={value} is a file, and {key} is the text itself: give what is in the file"]
