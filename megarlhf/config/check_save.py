"""The run directory, tried out before anything starts.

Asking for permissions is not enough. Read-only and full disks, quotas, names that are too long, links to nowhere and
places such as /proc show only when something is made there, so a probe does once what the run will do: make the
directory, write a file of it to the disk, rename it. Everything that the probe makes is removed again.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from megarlhf.formats.run_checkpoints import LATEST

# of a run, if they are there
_EXPORTS = [name + suffix for name in ("hf", "hf_ema", "hf_best", "hf_critic") for suffix in ("", ".partial")]
_DIRECTORIES = ("checkpoints", *_EXPORTS, "pretrain_data", "logs", "tensorboard", "wandb")
_FILES = ("config.yaml", "metrics.jsonl", "report.html", "report.png")
_LONGEST = 110  # characters of a run's longest file name, which is TensorBoard's with the host's name
_PROBE_BYTES = 64 * 1024


def save_errors(path: str, load: str | None, *, starts_again: bool = False) -> list[str]:
    """A run directory that cannot be written, or that holds another run than the one to continue.

    Args:
        starts_again: what is there is of an earlier start of this run, which ended before its first checkpoint.
    """
    errors = directory_errors(path)
    holds = any(os.path.exists(os.path.join(path, name)) for name in ("metrics.jsonl", "checkpoints"))
    if errors or starts_again or not holds:
        return errors
    if load is None:
        return [
            f"save={path} holds a run already (a fresh one would mix with it): set load to {path} to continue it, or "
            "save to another directory"
        ]
    said = f"save={path} holds another run than load={load} (they would mix): save to {load} or to another directory"
    return [] if _is_same(path, load) else [said]


def ckpt_errors(save: str, ckpt_path: str | None) -> list[str]:
    """A directory of checkpoints that cannot be written, or that holds another run's."""
    own = os.path.join(save, "checkpoints")
    if ckpt_path is None or _is_same(own, ckpt_path):
        return []
    if os.path.lexists(own):
        return [f"ckpt_path={ckpt_path}, and {own} has the run's checkpoints already: leave ckpt_path out"]
    if os.path.exists(os.path.join(ckpt_path, LATEST)):
        return [f"ckpt_path={ckpt_path} holds another run's checkpoints than that of save={save}: choose another"]
    return directory_errors(ckpt_path, option="ckpt_path")


def directory_errors(path: str, *, option: str = "save") -> list[str]:
    """A directory that cannot be made or written; what is made to see it is removed again."""
    if not path:
        return [f"{option}= is empty: name a directory"]
    try:
        _try(Path(path).absolute())
    except (OSError, ValueError) as error:  # ValueError: a character that no file name may have
        return [f"{option}={path} cannot be made or written ({_reason(error)}): choose another directory"]
    return []


def _reason(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    place = Path(error.filename)
    for link in (place, *place.parents):
        if os.path.islink(link) and not os.path.exists(link):
            return f"{link} is a link to {os.readlink(link)}, which is not there"
    return f"{place}: {error.strerror}"


def _is_same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # load_errors says what is wrong with it
        return False


def _try(directory: Path) -> None:
    """Raises OSError or ValueError where a run could not do its work in `directory`."""
    with _made(directory):
        _probe(directory)
        for name in _DIRECTORIES:
            if os.path.lexists(directory / name):
                _probe(directory / name)
        for name in _FILES:
            if os.path.lexists(directory / name):
                with (directory / name).open("ab"):
                    pass


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """The directory is there inside the block, made with its parents if need be; those that it makes go again."""
    missing = list(takewhile(lambda place: not os.path.lexists(place), (directory, *directory.parents)))
    made: list[Path] = []
    try:
        for place in reversed(missing):
            place.mkdir()
            made.append(place)
        yield
    finally:
        for place in reversed(made):
            with suppress(OSError):  # somebody else has put something there meanwhile: it stays
                place.rmdir()


def _probe(directory: Path) -> None:
    """Write a file in a new directory below to the disk, and rename that directory, as checkpoints are made."""
    first = Path(tempfile.mkdtemp(prefix=".probe-", dir=directory))
    second = first.with_suffix(".partial")
    try:
        with (first / ("x" * _LONGEST)).open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        first.rename(second)
    finally:
        for place in (first, second):
            shutil.rmtree(place, ignore_errors=True)
