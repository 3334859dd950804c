"""The small JSON files of a checkpoint, and the lines of large files of data."""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_object(path: Path, source: str) -> dict[str, Any]:
    """A file that holds one JSON object.

    Args:
        source: option and value that led to the file, for messages.
    Raises:
        ValueError: it is not there, cannot be read, is no JSON, or holds something else than an object.
    """
    if not os.path.isfile(path):  # unlike Path.is_file it takes names that the system refuses
        raise ValueError(f"{source}; it has no {path.name}: give the directory of a Hugging Face checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{source}; {path.name} cannot be read as JSON ({error}): repair it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}; {path.name} holds no JSON object: repair it")
    return value


def json_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1 on; a byte-order mark is none of the text."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield number, text


def json_row(line: bytes) -> dict[str, Any]:
    """The object that is written on a line, else ValueError with a sentence about `it`."""
    try:
        return as_object(parse_json(line.rstrip()))
    except ValueError as error:
        cut = "" if line.endswith(b"\n") else " (the file ends in this line: was it cut off?)"
        raise ValueError(f"{error}{cut}") from error


def parse_json(text: bytes) -> Any:
    """The JSON value of a text, else ValueError with a sentence about `it`."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:  # also numbers of more than 4,300 digits, and thousands of brackets
        raise ValueError(f"it is not JSON: {error}") from error


def as_object(value: object) -> dict[str, Any]:
    """A JSON value that is an object, else ValueError with a sentence about `it`."""
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object with named fields")
    return value


def broken_file(directory: Path) -> str | None:
    """What is wrong with the first of a directory's small files that cannot be read; None where none is.

    For the errors of libraries that do not say which file they read.
    """
    for path in sorted(directory.glob("*.json")):
        try:
            read_json_object(path, str(directory))
        except ValueError as error:
            return str(error)
    for path in sorted(directory.glob("*.jinja")):
        try:
            path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return f"{directory}; {path.name} is no UTF-8 text ({error}): repair it"
    return None


def one_line(error: BaseException) -> str:
    """A library's error as a part of one sentence: its kind and what it says, at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
