"""A .jsonl file that is written piece by piece, survives its process, and appears whole or not at all.

    <target>.partial    first line: what decides every line of it; then the lines so far

A killed process leaves no target, or the one that was there; the next with the same identity goes on.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megarlhf.formats.staging import staging_path, sync

logger = logging.getLogger(__name__)


class GrowingLines(AbstractContextManager["GrowingLines"]):
    """The lines of `target` while they are made; the end of a `with` block that raises nothing puts them there.

    Attributes:
        num_lines: complete lines that are there.
    Raises:
        ValueError: another process is writing them.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any]) -> None:
        """Go on with what an earlier process has written, where `identity`, JSON values, is the same."""
        self.target, self.path = target, staging_path(target)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"output={target}; another process is writing {self.path}: wait for it") from error
        header = json.dumps(identity, sort_keys=True).encode() + b"\n"
        self._file.seek(0)
        self._ends = [0]  # place in the file after the identity, and after each line
        if self._file.readline() == header:
            self._ends = [len(header)]
            self._ends += [self._file.tell() for line in iter(self._file.readline, b"") if line.endswith(b"\n")]
        elif self._file.tell():
            logger.warning("output=%s was begun with other options or samples: it begins anew", target)
        self.keep(self.num_lines)
        if self._ends == [0]:
            self._write(header)
            self._ends = [len(header)]

    @property
    def num_lines(self) -> int:
        """Complete lines that are there."""
        return len(self._ends) - 1

    def keep(self, num_lines: int) -> None:
        """Drop all lines after the first so many."""
        del self._ends[num_lines + 1 :]
        self._file.truncate(self._ends[-1])

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one line for each row, and wait until they are on the disk.

        Raises:
            ValueError: a number that JSON has no form for.
        """
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows]
        self._write(b"".join(lines))
        for line in lines:
            self._ends.append(self._ends[-1] + len(line))

    def _write(self, text: bytes) -> None:
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Put the lines in the target's place, for what was there; after an error they wait for the next process."""
        if error is None:
            whole = self.target.with_name(self.target.name + ".whole")
            self._file.seek(self._ends[0])
            with whole.open("wb") as file:
                shutil.copyfileobj(self._file, file)
            sync(whole)
            whole.replace(self.target)
            sync(self.target.parent)
            self.path.unlink()
        self._file.close()
