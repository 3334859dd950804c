"""A directory that is made under another name, step by step, and appears whole or not at all.

    <target>.partial/                 the directory while it is made
    <target>.partial/progress.jsonl   first line: what is being made; then one line for each step that is done

A process killed at any moment leaves no target; the next one with the same identity goes on after the steps noted.
Nothing is removed that was not made here: without a journal the directory is somebody else's.
"""

import fcntl
import json
import os
import shutil
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

_JOURNAL = "progress.jsonl"


def staging_path(target: Path) -> Path:
    """Where a target is made."""
    return target.with_name(target.name + ".partial")


def check_staging(target: Path) -> None:
    """Raises ValueError where the place to make `target` in is taken by something that was not made here."""
    path = staging_path(target)
    if not path.exists() or (path / _JOURNAL).is_file() or (path.is_dir() and not any(path.iterdir())):
        return
    raise ValueError(
        f"save={target}; {path}, where it would be made, holds something else (no {_JOURNAL}): move that away, or give "
        "another directory"
    )


class StagingDirectory(AbstractContextManager["StagingDirectory"]):
    """The directory `path`, on its way to `target`, which a `with` block fills.

    Args:
        identity: JSON values that decide every byte; a staging directory with another identity is thrown away.
    Raises:
        ValueError: another process is making the same target, or see check_staging.
    """

    def __init__(self, target: Path, identity: dict[str, Any]) -> None:
        self.target, self.path = target, staging_path(target)
        check_staging(target)
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = open(self.path / _JOURNAL, "a+", encoding="utf-8")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"save={target}; another process is writing {self.path}: wait for it") from error
        self._lock = threading.Lock()
        found, self.done = self._read()
        if found != json.loads(json.dumps(identity)):
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != _JOURNAL:
                    entry.unlink()
            self._journal.truncate(0)
            self.done = {}
            self._append(identity)

    def _read(self) -> tuple[Any, dict[str, Any]]:
        """Identity and steps of an earlier process; a last line that was cut off does not count."""
        self._journal.seek(0)
        text = self._journal.read()
        whole = text[: text.rfind("\n") + 1]
        self._journal.truncate(len(whole.encode()))
        lines = [json.loads(line) for line in whole.splitlines()]
        return (lines[0], dict(lines[1:])) if lines else (None, {})

    def _append(self, value: Any) -> None:
        self._journal.write(json.dumps(value) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def note(self, step: str, record: Any) -> None:
        """Remember a step whose files are on disk (fsync), with what later steps need of it; from any thread."""
        with self._lock:
            self.done[step] = record
            self._append([step, record])

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Bring all to the disk and put the directory in its place, for what was there.

        After an error what is done is kept, but for a ValueError, which a rerun would meet again.
        """
        if error is None:
            sync(*self.path.rglob("*"), self.path)
            replace_directory(self.path, self.target)
            (self.target / _JOURNAL).unlink()
            sync(self.target.parent)
        elif isinstance(error, ValueError):
            shutil.rmtree(self.path)
        self._journal.close()


def sync(*paths: Path) -> None:
    """Write files, or directories' entries, to the disk and wait."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_directory(staging: Path, final: Path) -> None:
    """Rename a complete directory to its final name; an older one of that name is removed."""
    old = final.with_name(f".{final.name}.megarlhf-old")
    shutil.rmtree(old, ignore_errors=True)  # of a replacement that was interrupted here
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text to the disk under another name, and give it its own: a kill leaves the old one or the new."""
    partial = staging_path(path)
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def replace_link(link: Path, target: Path) -> None:
    """Make a link by a relative path, or point it elsewhere; at every moment it is there or was never."""
    made = staging_path(link)
    made.unlink(missing_ok=True)
    made.symlink_to(os.path.relpath(target.absolute(), link.absolute().parent))
    made.replace(link)
    sync(link.parent)
