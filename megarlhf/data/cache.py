"""Tokenized data that a later run reads again: one directory for each set of files and options that made it."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megarlhf.data.supervised import SupervisedData


def cached(directory: str, key: Mapping[str, Any], make: Callable[[], SupervisedData]) -> tuple[SupervisedData, Path]:
    """What an earlier call with an equal key has made, else what `make` makes, which is kept; and where it lies.

    Runs may share the directory: what one of them has not finished, no other sees.

    Args:
        directory: made where it is not there.
        key: all that the result depends on, besides this package's code and the tokenizers' versions.
    Raises:
        ValueError: nothing can be written there.
    """
    text = json.dumps({**key, "code": _code()}, sort_keys=True, default=str, indent=1)
    place = Path(directory) / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    if place.is_dir():
        return SupervisedData.open(place), place
    data = make()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=place.parent, prefix="partial-") as name:
            whole = Path(name) / "data"
            data.save(whole)
            (whole / "key.json").write_text(text)
            if not place.is_dir():
                os.rename(whole, place)
    except OSError as error:
        if not place.is_dir():  # else another run has made it meanwhile
            raise ValueError(
                f"data_cache_path={directory} cannot be written ({error}): give a directory with room, or leave it out"
            ) from error
    return data, place


def file_stamps(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """Path, bytes and time of the last change (ns) of files, and of those in directories."""
    files = [file for path in paths for file in ([Path(path)] if Path(path).is_file() else Path(path).rglob("*"))]
    found = sorted((str(file.resolve()), file.stat()) for file in files if file.is_file())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


@cache
def _code() -> list[str]:
    """What makes rows of files: the modules of this folder, and the packages that they call."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), *(version(name) for name in ("transformers", "tokenizers", "datasets", "jinja2"))]
