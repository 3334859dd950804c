"""An inference engine without a model: its answers depend on its weights' version, the place and the step alone."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megarlhf.cluster.processes import Store
from megarlhf.data.types import GeneratedGroup


class AnsweringWorker:
    """Does in each `generate` what the next word of a file beside its log says, and answers where there is none.

    "hold": answer when the file is gone. The others: "answer", "die", "raise", "hang".
    """

    def __init__(self, spec: SimpleNamespace, store: Store) -> None:
        self._fault = Path(spec.log_file).with_suffix(".fault")
        self._store, self._blocks = store, list[str]()
        self._version = -1

    def start(self) -> None:
        while self._fault.with_suffix(".late").exists():
            time.sleep(0.05)

    def connect_weights(self, blocks: list[str]) -> None:
        self._blocks = blocks

    def update_weights(self, version: int, checksum: str) -> dict[str, Any]:
        assert self._blocks, "connected first"
        self._version = version
        return {"version": version, "checksum": checksum}

    def generate(
        self, prompts: Sequence[Any], places: Sequence[int], n_samples: int, step: int, temperature: float | None
    ) -> list[tuple[GeneratedGroup, str]]:
        self._meet_fault()
        return [
            (
                GeneratedGroup(
                    tokens=None,
                    lengths=np.full(n_samples, 2 + place),
                    texts=[f"{step}/{place}/{sample}/{len(prompt)}" for sample in range(n_samples)],
                    stop_texts=[""] * n_samples,
                    finish_reasons=["stop"] * n_samples,
                    weight_version=self._version,
                ),
                f"tokens of {place}",
            )
            for prompt, place in zip(prompts, places, strict=True)
        ]

    def _meet_fault(self) -> None:
        word, *others = self._fault.read_text().split() if self._fault.exists() else ["answer"]
        while word == "hold" and self._fault.exists():
            time.sleep(0.01)
        self._fault.unlink(missing_ok=True)
        if others:
            self._fault.write_text(" ".join(others))
        if word == "hang":
            time.sleep(600)
        if word == "raise":
            raise ValueError("no such prompt")
        if word == "die":
            os._exit(3)


class StoringWorker(AnsweringWorker):
    """Its tokens lie in the store: (place, process) as an array. Each answer is a line of a file beside its log."""

    def generate(
        self, prompts: Sequence[Any], places: Sequence[int], n_samples: int, step: int, temperature: float | None
    ) -> list[tuple[GeneratedGroup, Any]]:
        answers = super().generate(prompts, places, n_samples, step, temperature)
        with self._fault.with_suffix(".answers").open("a") as file:
            print(os.getpid(), *places, file=file)
        stored = self._store.put([np.array([place, os.getpid()]) for place in places])
        return [(group, tokens) for (group, _), tokens in zip(answers, stored, strict=True)]


class ReadingWorker:
    """Reads what others have stored."""

    def __init__(self, spec: SimpleNamespace, store: Store) -> None:
        self._store = store

    def begin(self, references: list[Any]) -> list[list[int]]:
        return [value.tolist() for value in self._store.get(references)]


class ActorWorker:
    """Holds weights without numbers."""

    def __init__(self, spec: SimpleNamespace, store: Store) -> None:
        self._number = 0

    def share_weights(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(num_bytes=8)]

    def refresh_shared_weights(self) -> list[bytes]:
        self._number += 1
        return [bytes([self._number])]
