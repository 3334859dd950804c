"""Worker processes of a training role without processes: real workers, over an engine that computes from token ids.

Response tokens name their sample and place, and so does every number that is computed of them or given for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megarlhf.cluster.group import WorkerGroup
from megarlhf.cluster.workers import MegatronWorker
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.config.roles import ROLES
from megarlhf.data.packing import gather_targets, join_values, pack_rows
from megarlhf.data.planning import PackingOptions
from megarlhf.data.types import Floats, GroupTokens, MicroBatch, Prompt, Rollout, Sample, TargetValues, TrainingRows
from megarlhf.engine.objective import StepResult

PACKING = PackingOptions(max_tokens=40, share_prefix=False)
WRONG = 1000.0  # what processes that compute along, and are not asked, are off by


class Ref:
    """A reference to a stored value, or a call that has been answered."""

    def __init__(self, value: Any) -> None:
        self.value = value


class PlainStore(list[Ref]):
    """A Store, and all that was put there."""

    def put(self, values: Sequence[Any]) -> list[Ref]:
        assert not any(isinstance(value, Ref) for value in values), "Ray takes no reference for an object"
        self += (stored := [Ref(value) for value in values])
        return stored

    def get(self, references: Sequence[Ref]) -> list[Any]:
        return [ref.value for ref in references]


@pytest.fixture
def store() -> PlainStore:
    return PlainStore()


def response(group: int, sample: int, length: int) -> list[int]:
    return [10_000 * (group + 1) + 100 * sample + place for place in range(length)]


def engines(token: Any) -> Any:
    """The inference engine's log-prob of a token."""
    return -token / 64


def own(token: Any, *, steps: int = 0) -> Any:
    """The trainer's, after so many optimizer steps."""
    return engines(token) - (token % 7) / 8 + steps


def reference(token: Any) -> Any:
    """The reference's."""
    return -token / 32


def value(token: Any) -> Any:
    """The critic's."""
    return token / 16


def advantage(token: Any) -> Any:
    """What the driver gives for a token."""
    return token / 4


def weight(group: int, sample: int) -> float:
    """What the driver gives for a sample."""
    return group + sample / 8


class PlainEngine:
    """In the place of a MegatronEngine; keeps the lines of its optimizer steps."""

    def __init__(self, head: str, kind: str, packing: PackingOptions) -> None:
        self.packing, self._head, self._kind = packing, head, kind
        self.ranks = SimpleNamespace(is_last_stage=kind != "first stage", holds_results=kind == "counts")
        self.lines: list[tuple[list[MicroBatch], float]] = []
        self._in_reference, self.reduction = False, SimpleNamespace(reached=1e12)

    def pack(self, rows: TrainingRows, indices: Sequence[int], min_length: int = 1) -> MicroBatch:
        return pack_rows(rows, indices, share_prefix=self.packing.share_prefix, min_length=min_length)

    def forward(self, batches: list[MicroBatch]) -> TargetValues:
        if not self.ranks.is_last_stage:
            return join_values([])
        return join_values([gather_targets(batch, self._values(batch)) for batch in batches])

    def _values(self, batch: MicroBatch) -> Any:
        tokens = batch.targets.double()
        if self._head == "value":
            computed = value(tokens)
        else:
            computed = reference(tokens) if self._in_reference else own(tokens, steps=len(self.lines))
        return computed if self.ranks.holds_results else computed + WRONG

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        self._in_reference = True
        yield
        self._in_reference = False

    def step(
        self, batches: list[MicroBatch], objective: Any, *, denominator: float, beside: Sequence[Any] = ()
    ) -> StepResult:
        outputs = self.forward(batches)
        self.lines.append((batches, denominator))
        number = float(len(self.lines))
        return StepResult(
            loss=1.5 * number, metrics={"m": 2.5}, grad_norm=3.5 * number, learning_rate=4.5, outputs=outputs
        )


class PlainWorkers(WorkerGroup):
    """A role's processes, here: arguments that are references are resolved, and none inside others."""

    def __init__(
        self,
        role: str,
        store: PlainStore,
        places: Sequence[tuple[int, str]],
        packing: PackingOptions,
        **options: Any,
    ) -> None:
        self.given: list[tuple[str, int, tuple[Any, ...]]] = []  # method, rank and arguments of every call
        config = from_dict(PPOConfig, {"pretrain": "m", "prompt_data": "d", "save": "s", **options})
        self.workers = [self._worker(role, store, kind, packing, config) for _, kind in places]
        processes = _PlainProcesses(self, store)
        super().__init__(ROLES[role], processes, range(len(places)), [], launch=repr, timeout_seconds=1.0)

    @staticmethod
    def _worker(
        role: str, store: PlainStore, kind: str, packing: PackingOptions, config: PPOConfig
    ) -> MegatronWorker:
        worker = object.__new__(MegatronWorker)  # whose __init__ takes over the process's output
        worker.spec, worker._store = SimpleNamespace(role=ROLES[role], config=config), store
        worker.engine = PlainEngine("value" if role == "critic" else "lm", kind, packing)
        worker.objective = worker.pretraining = worker.average = None
        return worker


class _PlainProcesses:
    """Processes of a group whose handles are ranks."""

    device_names: Mapping[tuple[int, int], str] = {}
    addresses: Mapping[int, str] = {}

    def __init__(self, group: PlainWorkers, store: PlainStore) -> None:
        self._group, self.store = group, store

    def has_lost(self, node: int) -> bool:
        return False

    def start(self, worker: Any, spec: Any, environment: Mapping[str, str]) -> Any: ...

    def kill(self, handle: int) -> None: ...

    def collect_logs(self) -> None: ...

    def submit(self, handle: int, method: str, *args: Any) -> Ref:
        self._group.given.append((method, handle, args))
        resolved = [argument.value if isinstance(argument, Ref) else argument for argument in args]
        return Ref(getattr(self._group.workers[handle], method)(*resolved))

    def wait(self, calls: Sequence[Ref], *, all_of_them: bool, timeout_seconds: float) -> tuple[list[Ref], list[Ref]]:
        return list(calls[-1:]), list(calls[:-1])  # the last is done first

    def result(self, call: Ref) -> Any:
        return call.value


def places_of(kinds: Sequence[tuple[int, str]], packing: PackingOptions = PACKING) -> list[tuple[int, PackingOptions]]:
    return [(replica, packing) for replica, _ in kinds]


def make_rollout(lengths: Sequence[Sequence[int]], *, without: Sequence[tuple[int, int]] = ()) -> Rollout:
    """Groups of samples of these lengths; those in `without` are not to be trained on, but their tokens are there."""
    samples, tokens = [], []
    for group, sizes in enumerate(lengths):
        prompt = np.arange(group + 1, dtype=np.int32) + 10 * group
        ids = [token for sample, size in enumerate(sizes) for token in response(group, sample, size)]
        tokens.append(
            Ref(
                GroupTokens(
                    prompt_ids=prompt,
                    response_ids=np.array(ids, dtype=np.int32),
                    rollout_log_probs=np.array([engines(token) for token in ids], dtype=np.float32),
                    lengths=np.array(sizes),
                )
            )
        )
        record = Prompt(index=group, text="", token_ids=prompt, label=None)
        samples += [
            Sample(
                **{"prompt": record, "group_id": group, "sample_id": sample, "response_length": size},
                **{"response_text": "", "finish_reason": "stop", "weight_version": 0},
            )
            for sample, size in enumerate(sizes)
            if (group, sample) not in without
        ]
    return Rollout(samples=samples, tokens=tuple(tokens))


def targets(samples: Sequence[Sample]) -> Floats:
    """Response tokens of samples, one behind the other."""
    ids = [token for s in samples for token in response(s.group_id, s.sample_id, s.response_length)]
    return np.array(ids, dtype=np.float32)
