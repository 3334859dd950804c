"""What runs inside the worker processes: one Megatron rank of a role, or one inference engine."""

import faulthandler
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megarlhf.algos.kl import KLEstimator, kl_estimate
from megarlhf.cluster.processes import Store
from megarlhf.cluster.weight_workers import ReceivesWeights, SendsWeights
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_precision import check_node
from megarlhf.config.precision import ENGINE_PHASES, Dtype, EnginePhase
from megarlhf.config.roles import EnginePart, Part, megatron_roles
from megarlhf.data.partition import Partition, RankRows, with_ends
from megarlhf.data.planning import PackingOptions
from megarlhf.data.types import KEPT_TOKENS, Floats, GeneratedGroup, GroupTokens, TokenIds
from megarlhf.formats.run_checkpoints import AVERAGE
from megarlhf.parallel.device import DeviceKind
from megarlhf.parallel.network import use_interface
from megarlhf.parallel.weight_group import Meeting, open_meeting
from megarlhf.planner.placement import Worker
from megarlhf.trainers.roles import LogProbDifference, UpdateResult


@dataclass(frozen=True, kw_only=True)
class WorkerSpec(Worker):
    """Who a worker process is, and its place in the plan."""

    config: PPOConfig
    world_size: int
    device_kind: DeviceKind  # the plan's
    stop_token_ids: tuple[int, ...]
    log_file: str
    directory: str  # the driver's working directory
    address: str | None = None  # of its node; None: all workers of the run are on one

    @property
    def name(self) -> str:
        """Of the process, for people."""
        return f"{self.role.name}-{self.rank}"

    def with_rollout_in(self, dtype: Dtype | None) -> "WorkerSpec":
        """The same for an engine that is to compute in another type."""
        precision = replace(self.config.precision, rollout_dtype=dtype)
        return replace(self, config=replace(self.config, precision=precision))


def redirect_output(path: str) -> None:
    """Send this process's output, its libraries' included, to a file; what a crash leaves is read from there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr)


def note(said: str) -> None:
    """A line in this process's log, with the seconds since 1970."""
    print(f"{time.time():.3f} {said}")


def check_own_device(spec: WorkerSpec) -> None:
    """Stop a worker that is not where its plan says.

    Raises:
        RuntimeError: it sees other devices than the plan gives it, or they have no FP8.
    """
    from megarlhf.parallel.device import check_device, device_capability, device_kind, num_local_gpus

    phases = ("rollout",) if spec.role.runs == "vllm" else ENGINE_PHASES if spec.role.trains else ()
    on_gpu = spec.device_kind == "gpu"
    check_node(spec.config.precision, phases, on_gpu=on_gpu, capability=device_capability())
    check_device(spec.device_kind, len(spec.devices), kind=device_kind(), num_gpus=num_local_gpus())


def set_up_process(spec: WorkerSpec) -> None:
    """What every worker process does first."""
    redirect_output(spec.log_file)
    if Path(spec.directory).is_dir():  # Ray starts it in the directory of its own processes
        os.chdir(spec.directory)
    if spec.address is not None:
        use_interface(spec.config.cluster.network_interface, address=spec.address)


class MegatronWorker(SendsWeights):
    """One rank of a model: the actor (with the reference beside it), the critic or a reward model."""

    def __init__(self, spec: WorkerSpec, store: Store) -> None:
        set_up_process(spec)
        import torch

        from megarlhf.trainers import assembly  # noqa: F401  (seconds, which all roles spend side by side)

        torch.set_num_threads(spec.threads)
        self.spec, self._store = spec, store

    def open_meeting(self) -> Meeting:
        """A place to meet for the ranks of this role."""
        self._role_store, meeting = open_meeting(one_host=self.spec.address is None)
        return meeting

    def start(self, init_method: str | Meeting) -> tuple[int, PackingOptions]:
        """Join the role's groups and load the model; returns the rank's data-parallel replica and its packing."""
        note("start")
        from megarlhf.parallel.device import freeze_garbage_collector
        from megarlhf.parallel.groups import initialize_groups
        from megarlhf.trainers.assembly import (
            build_average,
            build_engine,
            build_objective,
            build_pretraining,
            chat_template,
            parallel_sizes,
        )

        spec, layout = self.spec, self.spec.role.layout(self.spec.config)
        check_own_device(spec)
        initialize_groups(
            parallel_sizes(layout),
            rank=spec.rank,
            world_size=spec.world_size,
            init_method=init_method,
            seed=spec.config.model.seed,
            timeout_minutes=layout.distributed_timeout_minutes,
        )
        self.engine = build_engine(spec.config, spec.role)
        if spec.role.keeps_reference(spec.config):
            self.engine.keep_reference(stays=spec.config.keeps_resident)
        self.objective = build_objective(spec.config, spec.role)
        self.pretraining = build_pretraining(spec.config, spec.role, self.engine)
        self.average = build_average(spec.config, spec.role, self.engine)
        self._chat_template = chat_template(spec.config) if spec.rank == 0 else None
        freeze_garbage_collector()
        return self.engine.ranks.dp_rank, self.engine.packing

    def begin(self, given: tuple[Partition, list[Any]]) -> None:
        """Take this rank's rows of a step.

        Args:
            given: its replica's partition, and references to the tokens of the partition's groups.
        """
        partition, references = given
        engine = self.engine
        self.rows = RankRows(partition, self._store.get(references), engine.pack, one_length=engine.packing.one_length)

    def keep(self, fields: Mapping[str, Floats], scalars: Mapping[str, Floats]) -> None:
        """See TrainingRole; of this rank's rows."""
        self.rows.keep(fields, scalars=scalars)

    def log_probs(self) -> LogProbDifference | None:
        """Keep `old_log_probs`; their difference to the inference engine's, where results count.

        Of truncated distributions also the tokens that they keep: all later passes of the step are over these, the
        reference's too, so that ratios and KL compare distributions of the same tokens (arXiv:2512.02556, keep sampling
        mask).
        """
        from megarlhf.engine.schedule import kept_tokens

        if not self.spec.config.rollout.is_truncated:
            found = self._forward("old_log_probs")
        else:
            found = self._forward(KEPT_TOKENS, kept_tokens)
            if self.engine.ranks.is_last_stage:
                both = self.rows.rows.fields[KEPT_TOKENS]
                self.rows.keep({"old_log_probs": both[:, 0].copy(), KEPT_TOKENS: both[:, 1:]})
            found = None if found is None else found[:, 0]
        return None if found is None else LogProbDifference.between(found, self.rows.rows.fields["rollout_log_probs"])

    def ref_log_probs(self) -> None:
        """Keep `ref_log_probs`."""
        with self.engine.reference_weights():
            self._forward("ref_log_probs")

    def kl(self, estimator: KLEstimator) -> Floats | None:
        """See ActorRole; of this rank's rows, where results count."""
        import torch

        if not self.engine.ranks.holds_results:
            return None
        own, reference = (torch.from_numpy(self.rows.rows.fields[f"{name}_log_probs"]) for name in ("old", "ref"))
        return np.asarray(kl_estimate(own, reference, estimator=estimator))

    def values(self) -> Floats | None:
        """Keep `old_values` and return them, where results count."""
        return self._forward("old_values")

    def scores(self, given: tuple[Partition, list[tuple[Any, list[int]]], int | None]) -> Floats | None:
        """The value of the last token of each of this rank's rows, where results count; nothing of them is kept.

        Args:
            given: its replica's partition; tokens of each of its groups, or references to them, with the numbers of
                the samples that were stopped; and the model's EOS.
        """
        partition, groups, eos = given
        tokens = []
        for reference, stopped in groups:
            (group,) = [reference] if isinstance(reference, GroupTokens) else self._store.get([reference])
            tokens.append(with_ends(group, np.isin(np.arange(len(group.lengths)), stopped), eos=eos))
        engine = self.engine
        rows = RankRows(partition, tokens, engine.pack, one_length=engine.packing.one_length)
        with self._giving_back():
            found = engine.forward(rows.batches())
        return rows.last_values(found) if engine.ranks.holds_results else None

    def _forward(self, name: str, compute: Any = None) -> Floats | None:
        """Keep what a pass over all rows gives for each target: log-probs, values, or what `compute` makes of it."""
        with self._giving_back():
            found = self.engine.forward(self.rows.batches(), **({} if compute is None else {"compute": compute}))
        if not self.engine.ranks.is_last_stage:
            return None
        field = self.rows.keep_values(name, found)
        return field if self.engine.ranks.holds_results else None

    def update(self, mini_batch: int, denominator: float) -> UpdateResult:
        """One optimizer step; it measures the difference of log-probs where no pass before it has."""
        started, is_policy, fields = time.perf_counter(), self.spec.role.head == "lm", self.rows.rows.fields
        unread = () if is_policy and self.spec.config.uses_tis else ("rollout_log_probs",)
        with self._giving_back():
            batches = self.rows.batches(mini_batch, unread=unread)
            beside = [] if self.pretraining is None else [self.pretraining.next_term()]
            done = self.engine.step(batches, self.objective, denominator=denominator, beside=beside)
            if self.average is not None:
                self.average.update()
        difference = None
        if is_policy and "old_log_probs" not in fields and self.engine.ranks.holds_results:
            difference = LogProbDifference.between(
                done.outputs.values, fields["rollout_log_probs"][done.outputs.indices]
            )
        numbers = {name: value for name, value in vars(done).items() if name != "outputs"}
        return UpdateResult(**numbers, difference=difference, seconds=self.engine.reduction.reached - started)

    def fall_back(self, phase: EnginePhase, why: str) -> bool:
        """See TrainingRole."""
        return self.engine.precision.fall_back(phase, why)

    def precision_report(self) -> tuple[dict[str, float], list[str]]:
        """See TrainingRole."""
        return self.engine.precision.report()

    @contextmanager
    def _giving_back(self) -> Iterator[None]:
        """Where another role is awake on the same device, what the block has freed goes back to it."""
        from megarlhf.parallel.device import release_cache

        yield
        config = self.spec.config
        if config.cluster.colocate_all_models and len(megatron_roles(config)) > 1:
            release_cache()

    def export(self, directory: str) -> None:
        """Write the model as a Hugging Face checkpoint; every rank takes part."""
        from megarlhf.engine.export import export_hf

        export_hf(
            self.engine,
            Path(directory),
            tokenizer=self.spec.config.model.tokenizer,
            chat_template=self._chat_template,
        )

    def export_average(self, directory: str) -> None:
        """Write the average of the weights in the same way."""
        assert self.average is not None, "enable_ema keeps it"
        with self.average.in_place():
            self.export(directory)

    def save(self, directory: str) -> None:
        """Write this role's checkpoint, the average of its weights in a directory beside it."""
        from megarlhf.engine.checkpoint import save_engine

        save_engine(self.engine, Path(directory))
        if self.average is not None:
            self.average.save(Path(directory).with_name(AVERAGE))

    def load(self, directory: str) -> None:
        """Continue from this role's checkpoint."""
        from megarlhf.engine.checkpoint import load_engine

        load_engine(self.engine, Path(directory), with_optimizer=not self.spec.config.logging.no_load_optim)
        if self.average is not None:
            self.average.load(Path(directory).with_name(AVERAGE))

    def sleep(self, parts: Sequence[Part]) -> None:
        """Give the device's memory of these parts to other roles."""
        self.engine.sleep(*parts)
        self._note_bytes("sleep", parts)

    def wake(self, parts: Sequence[Part]) -> None:
        """Take it back."""
        self.engine.wake(*parts)
        self._note_bytes("wake", parts)

    def _note_bytes(self, told: str, parts: Sequence[Part]) -> None:
        held = " ".join(f"{part}={held}" for part, held in self.engine.memory.num_bytes().items())
        note(f"{told} {'+'.join(parts)}; bytes on the device: {held}")

    def largest_bytes(self) -> dict[Part, int]:
        """See DeviceMemory.largest_bytes."""
        return self.engine.memory.largest_bytes()


class RolloutWorker(ReceivesWeights):
    """One vLLM engine."""

    def __init__(self, spec: WorkerSpec, store: Store) -> None:
        set_up_process(spec)
        from megarlhf.rollout import weight_transfer  # noqa: F401  (vLLM: seconds, side by side with the other roles)

        self.spec, self._store = spec, store

    def start(self) -> None:
        """Load the engine; its weights are replaced by the first sync."""
        note("start")
        check_own_device(self.spec)
        self._load(in_fp8=self.spec.config.rollout_dtype == "fp8")

    def set_fp8(self, on: bool) -> None:
        """Load the engine anew: what a layer's weights are kept in is decided when it is made."""
        note(f"{'into' if on else 'out of'} fp8")
        self.engine.close()
        self._load(in_fp8=on)

    def _load(self, *, in_fp8: bool) -> None:
        from megarlhf.rollout.engine import RolloutEngine

        config, options = self.spec.config, self.spec.config.rollout
        by_block, asked = config.precision.fp8_recipe == "blockwise", config.rollout_dtype
        self.engine = RolloutEngine(
            config.model.pretrain,
            dtype="bfloat16" if asked == "bf16" or (asked == "fp8" and config.model.bf16) else "float32",
            quantization=("fp8_per_block" if by_block else "fp8_per_tensor") if in_fp8 else None,
            seed=config.model.seed,
            max_model_len=config.max_row_tokens,
            tensor_parallel_size=config.cluster.vllm_tensor_parallel_size,
            max_num_seqs=options.max_num_seqs,
            enforce_eager=options.enforce_eager,
            gpu_memory_utilization=options.vllm_gpu_memory_utilization,
            kv_cache_gib=options.vllm_kv_cache_gib,
            threads=self.spec.threads,
            tokenizer_dir=config.model.tokenizer,
            skip_special_tokens=config.reward.reward_skip_special_tokens is not False,
            passed=config.passed.vllm,
        )

    def generate(
        self,
        prompts: Sequence[TokenIds],
        group_ids: Sequence[int],
        n_samples: int,
        step: int,
        temperature: float | None,
    ) -> list[tuple[GeneratedGroup, Any]]:
        """Samples of each prompt, and a reference to their tokens; None: at the run's temperature, 0: greedy."""
        config, options = self.spec.config, self.spec.config.rollout
        groups = self.engine.generate(
            prompts,
            group_ids=list(group_ids),
            n_samples=n_samples,
            max_tokens=options.generate_max_len,
            temperature=options.temperature if temperature is None else temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            stop_token_ids=list(self.spec.stop_token_ids),
            run_seed=config.model.seed,
            step=step,
            greedy=temperature == 0,
        )
        stored = self._store.put([group.tokens for group in groups])
        return [(replace(group, tokens=None), tokens) for group, tokens in zip(groups, stored, strict=True)]

    def sleep(self, keep_weights: bool) -> None:
        """See RolloutEngine.sleep."""
        self.engine.sleep(keep_weights=keep_weights)
        note(f"sleep, weights {'kept' if keep_weights else 'dropped'}")

    def wake(self, parts: Sequence[EnginePart]) -> None:
        """See RolloutEngine.wake."""
        self.engine.wake(parts)
        note(f"wake {'+'.join(parts)}")
