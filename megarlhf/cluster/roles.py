"""The loop's roles over groups of worker processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megarlhf.cluster.group import WorkerGroup
from megarlhf.data.shared_tensors import checksum
from megarlhf.data.types import Prompt, Sample, TrainingRow
from megarlhf.engine import checkpoint_files
from megarlhf.trainers.roles import UpdateResult


def _merge(results: Sequence[dict[int, Tensor]], count: int) -> list[Tensor]:
    """Per-row results of all data-parallel replicas, in row order."""
    merged: dict[int, Tensor] = {}
    for part in results:
        merged.update(part)
    return [merged[i] for i in range(count)]


class TrainingGroup:
    """The actor (with its reference) or the critic, as ActorRole and CriticRole ask."""

    def __init__(self, workers: WorkerGroup) -> None:
        self.workers = workers

    def log_probs(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        """See ActorRole."""
        return _merge(self.workers.call("log_probs", list(rows)), len(rows))

    def ref_log_probs(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        """See ActorRole."""
        return _merge(self.workers.call("ref_log_probs", list(rows)), len(rows))

    def values(self, rows: Sequence[TrainingRow]) -> list[Tensor]:
        """See CriticRole."""
        return _merge(self.workers.call("values", list(rows)), len(rows))

    def update(self, rows: Sequence[TrainingRow], *, denominator: float) -> UpdateResult:
        """See ActorRole and CriticRole."""
        results = self.workers.call("update", list(rows), denominator)
        first = results[0]
        return UpdateResult(
            loss=first.loss,
            metrics=first.metrics,
            grad_norm=first.grad_norm,
            learning_rate=first.learning_rate,
            outputs=_merge([result.outputs for result in results], len(rows)),
        )


class RolloutGroup:
    """The inference engines; prompts are dealt over them in turn, the samples of one prompt stay together."""

    def __init__(self, workers: WorkerGroup, *, n_samples_per_prompt: int) -> None:
        self.workers, self.n_samples = workers, n_samples_per_prompt

    def generate(self, prompts: Sequence[Prompt], *, step: int) -> list[Sample]:
        """See RolloutRole."""
        return self._generate(prompts, self.n_samples, step, greedy=False)

    def generate_greedy(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """See RolloutRole."""
        return self._generate(prompts, 1, 0, greedy=True)

    def _generate(self, prompts: Sequence[Prompt], n_samples: int, step: int, *, greedy: bool) -> list[Sample]:
        refs, count = [], len(self.workers.handles)
        for engine, handle in enumerate(self.workers.handles[: len(prompts)]):
            groups = list(range(engine, len(prompts), count))
            refs.append(handle.generate.remote([prompts[g] for g in groups], groups, n_samples, step, greedy))
        parts = self.workers.wait_for(refs, "generate")
        samples = [sample for part in parts for sample in part]
        return sorted(samples, key=lambda sample: (sample.group_id, sample.sample_id))


class SharedMemorySync:
    """Weights are read where the actor's ranks hold them: in shared memory, from the first sync on."""

    def __init__(self, actor: WorkerGroup, rollout: WorkerGroup) -> None:
        self.actor, self.rollout = actor, rollout
        self._num_bytes = 0

    def push(self, version: int) -> dict[str, float]:
        """See WeightSyncRole.

        Raises:
            RuntimeError: an engine reports another version or checksum than was sent.
        """
        if not self._num_bytes:
            blocks = [block for part in self.actor.call("share_weights") for block in part]
            self.rollout.call("connect_weights", blocks)
            self._num_bytes = sum(block.num_bytes for block in blocks)
        sent = checksum(digest for part in self.actor.call("refresh_shared_weights") for digest in part)
        for engine, reply in enumerate(self.rollout.call("update_weights", version, sent)):
            if (reply["version"], reply["checksum"]) != (version, sent):
                raise RuntimeError(
                    f"rollout engine {engine} holds weights version {reply['version']} with checksum "
                    f"{reply['checksum']}; version {version} with {sent} was sent"
                )
        return {"sync/version": float(version), "sync/bytes": float(self._num_bytes)}


class CheckpointGroup:
    """Complete checkpoints of the training roles under one root."""

    def __init__(
        self, root: Path, roles: dict[str, WorkerGroup], *, keep: int, identity: dict[str, Any], with_optimizer: bool
    ) -> None:
        self.root, self.roles, self.keep, self.identity = root, roles, keep, identity
        self.with_optimizer = with_optimizer  # of what is loaded
        self.last_saved: int | None = None

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        """See CheckpointRole."""
        try:
            partial = checkpoint_files.begin(self.root, step)
            for name, workers in self.roles.items():
                workers.call("save", str(partial / name))
                if not (partial / name).is_dir():
                    raise RuntimeError(
                        f"the {name} saved nothing to {partial / name}: save must be a place all nodes share"
                    )
            checkpoint_files.commit(self.root, step, run_state | {"identity": self.identity}, keep=self.keep)
        except Exception:
            checkpoint_files.abandon(self.root, step)
            raise
        self.last_saved = step

    def load(self, root: Path) -> dict[str, Any]:
        """Bring every role to the latest checkpoint under `root`; returns the loop's state.

        Raises:
            ValueError: no complete checkpoint, or one of another model or algorithm.
        """
        _, directory, state = checkpoint_files.latest(root)
        saved = state.get("identity", {})
        checkpoint_files.check_identity(saved, self.identity, directory, with_optimizer=self.with_optimizer)
        for name, workers in self.roles.items():
            workers.call("load", str(directory / name))
        return state
