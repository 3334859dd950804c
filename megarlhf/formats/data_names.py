"""Names of data sets on the command line: local paths, `type@directory`, and several of them in a comma list."""

import os
import re
from pathlib import Path
from typing import NamedTuple

SUFFIXES = {"json": (".jsonl", ".json"), "csv": (".csv",), "parquet": (".parquet",), "arrow": (".arrow",)}

_DOWNLOAD = "hf download --repo-type dataset {} --local-dir DIR"


class DataName(NamedTuple):
    """One data set: where it is, and the kind of the directory's files that are its own; None: there is one kind."""

    path: str
    kind: str | None = None


def data_names(text: str) -> list[DataName]:
    """The data sets that a text names: itself where it is a path, else each part between commas."""
    parts = [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]
    return [_data_name(part) for part in parts]


def _data_name(text: str) -> DataName:
    kind, at, path = text.partition("@")
    return DataName(text) if not at or os.path.exists(text) else DataName(path, kind)


def named_sets(text: str) -> list[tuple[str, str]]:
    """The data sets that an evaluation keeps apart, as (name, data set): NAME=PATH, or named for the file's stem.

    A single one without a name is called "".
    """
    parts = [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]
    pairs = [("", part) if os.path.exists(part) or "=" not in part else part.split("=", 1) for part in parts]
    if len(pairs) == 1:
        return [(pairs[0][0], pairs[0][1])]
    return [(name or Path(_data_name(place).path).stem, place) for name, place in pairs]


def set_errors(key: str, text: str) -> list[str]:
    """What is wrong with the data sets that option `key` names for an evaluation, in sentences for the user."""
    sets = named_sets(text)
    names = [name for name, _ in sets]
    errors = [error for _, place in sets for error in name_errors(key, place)]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            errors.append(f"{key}={text} has two sets of the name {name}: give names, as in math=PATH,code=PATH")
        elif name and not re.fullmatch(r"[\w.-]+", name):
            errors.append(f"{key}={text}; the name {name!r} takes letters, digits, _, . and -: give another")
    return errors


def probabilities(text: str | None) -> tuple[float, ...] | None:
    """The probabilities in a comma list of positive numbers, as they are in proportion to each other.

    Raises:
        ValueError: it is no such list.
    """
    if text is None:
        return None
    weights = [float(part) for part in text.split(",")]
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"{text} is not a list of positive numbers")
    return tuple(weight / sum(weights) for weight in weights)


def probability_errors(key: str, text: str | None, data_key: str, data: str) -> list[str]:
    """What is wrong with the probabilities in option `key` of the data sets in `data_key`, in sentences."""
    names = data_names(data)
    try:
        probs = probabilities(text)
    except ValueError:
        return [f"{key}={text} must be positive numbers with commas between them, such as 0.7,0.3"]
    if probs is None or len(probs) == len(names):
        return []
    return [f"{key}={text} has {len(probs)} numbers for the {len(names)} data sets of {data_key}: give one for each"]


def held_out_part(split: str | None) -> float | None:
    """The part of the data that a split named by a number, such as 0.03, takes; None for names."""
    try:
        return float(split or "")
    except ValueError:
        return None


def name_errors(key: str, text: str) -> list[str]:
    """What is wrong with the data sets that option `key` names, in sentences for the user."""
    errors = []
    for path, kind in data_names(text):
        if kind is not None and kind not in SUFFIXES:
            errors.append(f"{key}={kind}@{path}; the type before @ is {', '.join(SUFFIXES)}: convert the data")
        elif kind is not None and not os.path.isdir(path):
            errors.append(f"{key}={kind}@{path}; {path} is not a directory, which type@directory names: correct it")
        elif not path:
            errors.append(f"{key}={text} has an empty name beside a comma: take the comma out")
        elif not os.path.exists(path):
            hub = f"; a data set of the Hub comes with `{_DOWNLOAD.format(path)}`, then set {key}=DIR"
            said = f"{key}={path} does not exist here (nothing is downloaded): give a file or a directory"
            errors.append(said + hub * bool(re.fullmatch(r"[\w-]+/[\w.-]+", path)))
    return errors
