"""Which stages of a run are finished: a journal beside its files, one line a stage."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarlhf.formats.json_files import json_lines, json_row

JOURNAL = "stages.jsonl"


class Stages:
    """The finished stages of the run in a directory, on disk.

    Attributes:
        seconds: of each finished stage, by its name.
    Raises:
        ValueError: the run that is there began with another identity, or another process runs it.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        """Go on with the run there, or begin one; `identity` holds JSON values."""
        self.seconds: dict[str, float] = {}
        self._path = directory / JOURNAL
        self._lock = self._path.open("a")  # for as long as this object lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"save={directory}; another process runs its stages: wait for it") from error
        present = json.loads(json.dumps(identity))
        lines = [line for _, line in json_lines(self._path)]
        if lines and not lines[-1].endswith(b"\n"):  # a kill cut it off
            os.truncate(self._path, self._path.stat().st_size - len(lines.pop()))
        if not lines:
            self._append({"identity": present})
            return
        saved, *finished = [json_row(line) for line in lines]
        before = saved["identity"]
        differing = [key for key in present if key in before and before[key] != present[key]]  # an option may be new
        if differing:
            details = "; ".join(f"{key}: was {before[key]}, now {present[key]}" for key in differing)
            raise ValueError(f"save={directory}; its run began otherwise ({details}): give the same, or another save")
        self.seconds = {stage["stage"]: stage["seconds"] for stage in finished}

    def finish(self, stage: str, seconds: float) -> None:
        """Note a stage whose files are on disk."""
        self.seconds[stage] = seconds
        self._append({"stage": stage, "seconds": round(seconds, 3)})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
