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
    """Dies, raises or hangs in `generate` where a file beside its log says so; the file is gone then."""

    def __init__(self, spec: SimpleNamespace, store: Store) -> None:
        self._fault = Path(spec.log_file).with_suffix(".fault")
        self._blocks: list[str] = []
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
        if self._fault.exists():
            fault = self._fault.read_text()
            self._fault.unlink()
            if fault == "hang":
                time.sleep(600)
            if fault == "raise":
                raise ValueError("no such prompt")
            os._exit(3)
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


class ActorWorker:
    """Holds weights without numbers."""

    def __init__(self, spec: SimpleNamespace, store: Store) -> None:
        self._number = 0

    def share_weights(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(num_bytes=8)]

    def refresh_shared_weights(self) -> list[bytes]:
        self._number += 1
        return [bytes([self._number])]
