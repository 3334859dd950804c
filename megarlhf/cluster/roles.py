"""The loop's roles over groups of worker processes."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from megarlhf.algos.kl import KLEstimator
from megarlhf.cluster.group import WorkerFailedError, WorkerGroup
from megarlhf.config.precision import EnginePhase
from megarlhf.data.partition import DataParallelSplit
from megarlhf.data.planning import PackingOptions
from megarlhf.data.types import Floats, Prompt, Rollout, Sample
from megarlhf.formats import run_checkpoints
from megarlhf.trainers.roles import LogProbDifference, UpdateResult


class TrainingGroup:
    """The actor (with its reference) or the critic, as ActorRole and CriticRole ask.

    Args:
        places: (data-parallel replica, packing) of the processes, in rank order.
    """

    def __init__(self, workers: WorkerGroup, places: Sequence[tuple[int, PackingOptions]]) -> None:
        self.workers, self._packing = workers, places[0][1]
        self._replicas = [replica for replica, _ in places]
        self._num_replicas = 1 + max(self._replicas)

    def begin(self, rollout: Rollout, mini_batches: Sequence[Sequence[int]]) -> None:
        """See TrainingRole."""
        split = DataParallelSplit(rollout.samples, mini_batches, num_ranks=self._num_replicas, packing=self._packing)
        given = [(own, [rollout.tokens[group] for group in own.groups.tolist()]) for own in split.partitions]
        self._split = split
        self._call("begin", [(stored,) for stored in self.workers.put(given)])

    def keep(self, fields: Mapping[str, Floats], *, scalars: Mapping[str, Floats]) -> None:
        """See TrainingRole."""
        own_fields, own_scalars = self._scatter(fields), self._scatter(scalars, per_row=True)
        stored = zip(self.workers.put(own_fields), self.workers.put(own_scalars), strict=True)
        self._call("keep", list(stored))

    def _scatter(self, values: Mapping[str, Floats], *, per_row: bool = False) -> list[dict[str, Floats]]:
        """Each replica's part of every array."""
        parts = {name: self._split.scatter(whole, per_row=per_row) for name, whole in values.items()}
        return [{name: part[replica] for name, part in parts.items()} for replica in range(self._num_replicas)]

    def log_probs(self) -> LogProbDifference:
        """See ActorRole."""
        return reduce(add, [found for found in self.workers.call("log_probs") if found is not None])

    def ref_log_probs(self) -> None:
        """See ActorRole."""
        self.workers.call("ref_log_probs")

    def kl(self, estimator: KLEstimator) -> Floats:
        """See ActorRole."""
        return self._gather(self.workers.call("kl", estimator))

    def values(self) -> Floats:
        """See CriticRole."""
        return self._gather(self.workers.call("values"))

    def update(self, mini_batch: int, *, denominator: float) -> UpdateResult:
        """See TrainingRole."""
        results: list[UpdateResult] = self.workers.call("update", mini_batch, denominator)
        differences = [result.difference for result in results if result.difference is not None]
        return replace(results[0], difference=reduce(add, differences) if differences else None)

    def fall_back(self, phase: EnginePhase, why: str) -> bool:
        """See TrainingRole."""
        return bool(self.workers.call("fall_back", phase, why)[0])

    def precision_report(self) -> tuple[dict[str, float], list[str]]:
        """See TrainingRole; ranks agree."""
        report: tuple[dict[str, float], list[str]] = self.workers.call("precision_report")[0]
        return report

    def stop(self) -> None:
        """See TrainingRole."""
        self.workers.kill()

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method on every process with the arguments of its data-parallel replica."""
        ranks = enumerate(self._replicas)
        refs = [self.workers.submit_to(rank, method, *arguments[replica]) for rank, replica in ranks]
        return self.workers.wait_for(refs, method)

    def _by_replica(self, results: Sequence[Floats | None]) -> list[Floats]:
        """What each data-parallel replica has computed."""
        pairs = zip(self._replicas, results, strict=True)
        found = {replica: result for replica, result in pairs if result is not None}
        return [found[replica] for replica in range(self._num_replicas)]

    def _gather(self, results: Sequence[Floats | None]) -> Floats:
        return self._split.gather(self._by_replica(results))


class RolloutGroup:
    """The inference engines. Prompts go to them in pieces, of which an engine that is done takes the next.

    The samples of one prompt stay together. Which engine answers a piece changes nothing in it: seeds follow from
    places, a piece is a batch of its own, and an engine begins it with an empty prefix cache.

    Args:
        at_once: samples that an engine works on at once; smaller pieces would leave it idle.
        replace: puts another engine in the place of one that is lost. What that one had been asked for is asked again,
            its earlier pieces too, as their tokens may have gone with it: the same seeds give the same samples. None:
            the loss of an engine is raised.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        *,
        n_samples_per_prompt: int,
        at_once: int,
        replace: Callable[[int, WorkerFailedError], None] | None = None,
        in_fp8: bool = False,
    ) -> None:
        self.workers, self.n_samples, self._replace = workers, n_samples_per_prompt, replace
        self._at_once = at_once
        self.in_fp8 = in_fp8

    def set_fp8(self, on: bool) -> None:
        """See RolloutRole; engines that take the place of lost ones do as well."""
        self.workers.call("set_fp8", on)
        self.workers.loads += 1
        self.in_fp8 = on
        self.workers.specs = [spec.with_rollout_in("fp8" if on else None) for spec in self.workers.specs]

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, first_place: int = 0, greedy: bool = False
    ) -> Rollout:
        """See RolloutRole."""
        places = range(first_place, first_place + len(prompts))
        return self._generate(prompts, places, self.n_samples, step, 0.0 if greedy else None, timed=True)

    def answer(self, prompts: Sequence[Prompt], *, n_samples: int, temperature: float | None) -> Rollout:
        """See RolloutRole."""
        return self._generate(prompts, [prompt.index for prompt in prompts], n_samples, 0, temperature)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        places: Sequence[int],
        n_samples: int,
        step: int,
        temperature: float | None,
        *,
        timed: bool = False,
    ) -> Rollout:
        """Samples whose seeds follow from the run's, the step and the prompts' places; None: the run's temperature."""
        cuts = cut_for_engines(
            len(prompts), num_engines=len(self.workers.handles), least=max(1, self._at_once // n_samples)
        )
        asked = [
            ([prompt.token_ids for prompt in prompts[cut]], list(places[cut]), n_samples, step, temperature)
            for cut in cuts
        ]
        found = [group for part in self._answers(asked, timed=timed) for group in part]
        samples = [
            Sample(
                prompt=prompts[group_id],
                group_id=group_id,
                sample_id=sample_id,
                response_length=int(group.lengths[sample_id]),
                response_text=text,
                stop_text=group.stop_texts[sample_id],
                finish_reason=group.finish_reasons[sample_id],
                weight_version=group.weight_version,
            )
            for group_id, (group, _) in enumerate(found)
            for sample_id, text in enumerate(group.texts)
        ]
        return Rollout(samples=samples, tokens=tuple(tokens for _, tokens in found))

    def _answers(self, asked: Sequence[tuple[Any, ...]], *, timed: bool) -> list[Any]:
        """What engines generate for each piece: one that is done, or has taken the place of another, is asked next."""
        answers, left = list[Any]([None] * len(asked)), deque(range(len(asked)))
        free, by = deque(range(len(self.workers.handles))), dict[int, int]()  # engines; who answered a piece
        waiting: dict[Any, tuple[int, int, float]] = {}  # engine, piece and time by call
        while left or waiting:
            while left and free:
                engine, piece = free.popleft(), left.popleft()
                call = self.workers.submit_to(engine, "generate", *asked[piece])
                waiting[call] = engine, piece, time.monotonic()
            call = self.workers.first_of({call: since for call, (*_, since) in waiting.items()})
            engine, piece, since = waiting.pop(call)
            free.append(engine)
            try:
                (answers[piece],) = self.workers.wait_for([call], "generate", ranks=[engine], since=since)
            except WorkerFailedError as error:
                if self._replace is None:
                    raise
                self._replace(engine, error)
                left = deque(sorted([*left, piece, *(other for other, who in by.items() if who == engine)]))
                by = {other: who for other, who in by.items() if who != engine}
                continue
            by[piece] = engine
            if timed:
                tokens = sum(int(group.lengths.sum()) for group, _ in answers[piece])
                self.workers.seconds.note("rollout", engine, time.monotonic() - since, tokens=tokens)
        return answers


def cut_for_engines(count: int, *, num_engines: int, least: int) -> list[slice]:
    """Pieces of so many prompts that engines take one after another: large ones first, so that all end together.

    Factoring (Hummel, Schonberg, Flynn, "Factoring: a method for scheduling parallel loops", CACM 35(8), 1992): a round
    deals half of what is left, one piece for each engine; the last one all of it, where half a share would be less than
    `least` prompts, or there is one engine. The pieces depend on these numbers alone; an engine's share is of
    1 + log2(share / least) of them at most.
    """
    cuts, start = list[slice](), 0
    while start < count:
        whole = -(-(count - start) // num_engines)
        last = num_engines == 1 or whole < 2 * least
        end = count if last else start + whole // 2 * num_engines
        bounds = [start + (end - start) * engine // num_engines for engine in range(num_engines + 1)]
        cuts += [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if a < b]
        start = end
    return cuts


class CheckpointGroup:
    """Complete checkpoints of the training roles under one root."""

    def __init__(
        self,
        root: Path,
        roles: dict[str, WorkerGroup],
        *,
        keep: int,
        most_gib: float | None = None,
        identity: dict[str, Any],
        with_optimizer: bool,
    ) -> None:
        self.root, self.roles, self.identity = root, roles, identity
        self._keep, self._most_gib = keep, most_gib
        self.with_optimizer = with_optimizer  # of what is loaded
        self.last_saved: int | None = None

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        """See CheckpointRole."""
        try:
            partial = run_checkpoints.begin(self.root, step)
            for name, workers in self.roles.items():
                workers.call("save", str(partial / name))
                if not (partial / name).is_dir():
                    raise RuntimeError(
                        f"the {name} saved nothing to {partial / name}: save must be a place all nodes share"
                    )
            run_state = run_state | {"identity": self.identity}
            run_checkpoints.commit(self.root, step, run_state, keep=self._keep, most_gib=self._most_gib)
        except Exception as error:
            run_checkpoints.abandon(self.root, step)
            if isinstance(error, OSError | run_checkpoints.SaveFailedError):
                raise run_checkpoints.save_failed(self.root, step, error) from error
            raise
        self.last_saved = step

    def load(self, root: Path) -> dict[str, Any]:
        """Bring every role to the latest checkpoint under `root`; returns the loop's state.

        Raises:
            ValueError: no complete checkpoint, or one of another model or algorithm.
        """
        _, directory, state = run_checkpoints.latest(root)
        saved = state.get("identity", {})
        run_checkpoints.check_identity(saved, self.identity, directory, with_optimizer=self.with_optimizer)
        for name, workers in self.roles.items():
            workers.call("load", str(directory / name))
        return state
