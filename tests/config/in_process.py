"""Whole programs in one process, up to the constructors and calls of PyTorch, Megatron-Core, vLLM and Ray.

Those note what they are given; everything of ours between the options and them runs as it is, the engine, the workers
and the loops included. The model's place is taken by per-token numbers that follow from the tokens.
"""

import contextlib
import io
import logging
import types
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.engine import (
    average,
    checkpoint,
    engine,
    export,
    optimizer,
    precision,
    schedule,
    sending,
    sequences,
    sharing,
)
from megarlhf.engine.objective import LossTerm, TokenOutputs
from megarlhf.formats.shared_memory import Block, Piece
from megarlhf.models.build import transformer_config
from megarlhf.models.fp8 import Statistics
from megarlhf.parallel import groups
from megarlhf.parallel.groups import Ranks
from megarlhf.trainers import assembly, kd

STEP = 0.004  # what an optimizer step adds to a weight


@dataclass
class Trace:
    """What a run gave to whom. Processes are (role, rank)."""

    process: tuple[str, int] = ("driver", 0)  # the one that computes now
    worlds: dict[tuple[str, int], dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    engines: dict[tuple[str, int], Any] = field(default_factory=dict)  # MegatronEngine
    llms: list[Any] = field(default_factory=list)  # FakeLLM
    calls: list[tuple[str, int, str]] = field(default_factory=list)  # of worker processes
    waits: list[float | None] = field(default_factory=list)  # limits given to ray.wait
    given: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))  # arguments by who got them
    said: str = ""
    warnings: list[str] = field(default_factory=list)
    error: str = ""

    def engine(self, role: str = "actor") -> Any:
        """A role's engine, its last rank's."""
        return next(engine for (name, _), engine in reversed(self.engines.items()) if name == role)

    def world(self, role: str = "actor") -> dict[str, Any]:
        """What a role's last rank set its groups up with."""
        return next(world for (name, _), world in reversed(self.worlds.items()) if name == role)


class FakeChunk(torch.nn.Module):
    """A model's chunk of layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))


class FakeDDP:
    """Megatron-Core's DistributedDataParallel."""

    def __init__(self, config: Any, ddp: Any, chunk: Any, *, disable_bucketing: bool) -> None:
        self.ddp, self.chunk, self.no_sync = ddp, chunk, contextlib.nullcontext
        self.buffers: list[Any] = []
        self.expert_parallel_buffers: list[Any] = []

    def zero_grad_buffer(self) -> None: ...

    def start_param_sync(self, *, force_sync: bool) -> None: ...


class FakeOptimizer:
    """Megatron-Core's optimizer: its configuration, and the rate of each step, which moves every weight by STEP."""

    def __init__(self, config: Any, chunks: Sequence[Any]) -> None:
        self.config, self.rates, self._chunks = config, [], chunks
        self.chained_optimizers: list[Any] = [self]
        self.optimizer = None
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.0}]

    def step(self) -> tuple[bool, float, None]:
        self.rates.append(self.param_groups[0]["lr"])
        for chunk in self._chunks:
            chunk.chunk.weight.data += STEP
        return True, 1.0, None

    def zero_grad(self) -> None: ...

    def reload_model_params(self) -> None: ...


def log_prob(token: float, temperature: float) -> float:
    """Of any token, as trainer and engine agree."""
    return -(1.0 + 0.05 * token) / temperature


def token_outputs(chunks: Sequence[Any], batch: Any, options: dict[str, Any]) -> TokenOutputs:
    """Per-token numbers of a micro-batch from its targets, and from how far the weight has moved."""
    chunk = getattr(chunks[0], "chunk", chunks[0])  # a teacher's is bare
    targets, moved = batch.targets.float(), float(chunk.weight.data) - 1.0
    if options["head"] == "value":
        return TokenOutputs(values=0.1 * targets + moved)
    log_probs = -(1.0 + 0.05 * targets) / options["distribution"].temperature + moved
    away, entropy = 0.3 + 0.02 * targets - moved, 0.5 + 0.01 * targets
    shares = batch.fields.get("shares")
    candidates = None if shares is None else (moved * torch.arange(shares.shape[-1])).expand_as(shares).log_softmax(-1)
    return TokenOutputs(
        log_probs=log_probs,
        entropy=entropy,
        divergence=away,
        teacher_entropy=entropy,
        candidates=candidates,
        likeliest=batch.targets,
    )


def run_forward(chunks: Any, batches: Sequence[Any], outputs: Any, compute: Any) -> list[TokenOutputs]:
    """In the place of Megatron-Core's forward pass."""
    found = [token_outputs(chunks, batch, outputs.keywords) for batch in batches]
    if compute is not schedule.kept_tokens:
        return found
    log_probs = [each.log_probs[:, None] for each in found if each.log_probs is not None]
    kept = outputs.keywords["distribution"].truncation.top_k
    return [TokenOutputs(candidates=torch.cat([each, each.new_zeros(len(each), kept)], -1)) for each in log_probs]


def run_forward_backward(
    chunks: Any, terms: Sequence[Any], outputs: Any, *, unit: float
) -> list[list[tuple[TokenOutputs, torch.Tensor]]]:
    """In the place of Megatron-Core's schedule: the real objectives on those numbers."""
    results = []
    for term in terms:
        computed = [token_outputs(chunks, batch, outputs.keywords) for batch in term.batches]
        pairs = zip(computed, term.batches, strict=True)
        results.append([(found, schedule.objective_sums(term.objective, found, batch)[1]) for found, batch in pairs])
    return results


def run_evaluation(chunks: Any, batches: Sequence[Any], outputs: Any, objective: Any) -> list[torch.Tensor]:
    """The same without gradients."""
    term = LossTerm(name="", batches=list(batches), objective=objective, denominator=1.0)
    return [sums for _, sums in run_forward_backward(chunks, [term], outputs, unit=1.0)[0]]


def patch_torch_and_megatron(patch: pytest.MonkeyPatch, trace: Trace) -> None:
    """Worlds of this one process, and models of no layers."""

    def join(backend: str, **options: Any) -> None:
        trace.worlds[trace.process] |= options

    def cut(tensor: int, pipeline: int, **options: Any) -> None:
        trace.worlds[trace.process] |= options | {"tensor": tensor, "pipeline": pipeline}

    def seed(number: int) -> None:
        trace.worlds[trace.process]["seed"] = number

    def copy(parts: list[torch.Tensor], mine: torch.Tensor, *, group: Any) -> None:
        for part in parts:
            part.copy_(mine)

    def gather(parts: list[Any], mine: Any) -> None:
        parts[:] = [mine]

    from megatron.core.tensor_parallel import random as megatron_random  # after megarlhf.parallel

    dist, parallel_state = torch.distributed, engine.parallel_state
    for module, name, value in (
        (dist, "init_process_group", join),
        (parallel_state, "initialize_model_parallel", cut),
        (megatron_random, "model_parallel_cuda_manual_seed", seed),
        (dist, "all_reduce", lambda *args, **options: None),
        (dist, "broadcast", lambda *args: None),
        (dist, "broadcast_object_list", lambda *args: None),
        (dist, "reduce", lambda *args: None),
        (dist, "barrier", lambda: None),
        (dist, "all_gather", copy),
        (dist, "all_gather_object", gather),
        (dist, "get_world_size", lambda *args: 1),
        (dist, "get_rank", lambda: 0),
        (torch, "set_num_threads", lambda number: None),
        (parallel_state, "get_context_parallel_group", lambda: types.SimpleNamespace(rank=lambda: 0)),
        (dist, "get_global_rank", lambda group, rank: rank),
        (sequences, "reduce", lambda sums, rank, *, group: sums + (sums == 0)),  # no row is on other ranks alone
        (parallel_state, "get_data_parallel_group", lambda **options: None),
        (groups, "_collect_left_groups", lambda: None),
        (engine, "current_ranks", lambda: ranks_of(trace.worlds[trace.process])),
        (engine, "build_model", build_model),
        (engine, "ModelWeights", FakeWeights),
        (engine, "Adapters", FakeAdapters),
        (engine, "Float16Module", lambda config, chunk: chunk),
        (engine, "DistributedDataParallel", FakeDDP),
        (optimizer, "DistributedDataParallel", FakeDDP),
        (engine, "RouterStatistics", FakeRouters),
        (precision, "Fp8Layers", FakeFp8Layers),
        (engine, "run_forward", run_forward),
        (engine, "run_forward_backward", run_forward_backward),
        (engine, "run_evaluation", run_evaluation),
        (engine, "release_memory", lambda: None),
        (optimizer, "get_megatron_optimizer", FakeOptimizer),
        (optimizer, "FiniteOptimizer", lambda chained: chained[0]),
        (sharing, "SharedWeights", FakeSharedWeights),
        (sending, "SentWeights", partial(FakeSentWeights, trace)),
        (kd, "output_weight", lambda chunk: chunk.weight),
        (kd, "frozen_output_weight", lambda chunk, *, num_rows: chunk.weight),
    ):
        patch.setattr(module, name, value)
    built = engine.MegatronEngine.__init__

    def remember(self: Any, *args: Any, **options: Any) -> None:
        built(self, *args, **options)
        # A teacher is in the student's process.
        is_teacher = self.optimizer is None and self.head == "lm"
        trace.engines[("teacher", trace.process[1]) if is_teacher else trace.process] = self
        trace.given["engines"].append((trace.process[0], self.head))

    def forward(self: Any, batches: Any, **options: Any) -> Any:
        num_rows = len({row for batch in batches for row in batch.places.rows.tolist()})
        trace.given[f"forward {trace.process[0]}"].append((num_rows, len(batches)))
        return forward_whole(self, batches, **options)

    packed: list[Any] = []  # the rows that were packed since: first those that are trained on

    def step(self: Any, batches: Any, objective: Any, *, denominator: float, beside: Sequence[Any] = ()) -> Any:
        trace.given[f"rows {trace.process[0]}"] += packed[:1]
        packed.clear()
        trace.given[f"denominator {trace.process[0]}"].append(denominator)
        trace.given[f"beside {trace.process[0]}"] += beside
        return step_whole(self, batches, objective, denominator=denominator, beside=beside)

    def share(self: Any, rows: Any, indices: Any = None) -> Any:
        if indices is not None:  # of a supervised run
            packed.append(rows.take(indices))
        return share_whole(self, rows, indices)

    def evaluate(self: Any, batches: Any, objective: Any) -> Any:
        trace.given[f"evaluated {trace.process[0]}"].append(len(packed[0]))
        packed.clear()
        return evaluate_whole(self, batches, objective)

    cls = engine.MegatronEngine
    forward_whole, step_whole, share_whole, evaluate_whole = cls.forward, cls.step, cls.micro_batches, cls.evaluate
    patch.setattr(cls, "__init__", remember)
    for method in (forward, step, evaluate):
        patch.setattr(cls, method.__name__, method)
    patch.setattr(cls, "micro_batches", share)
    patch_files(patch, trace)


def patch_files(patch: pytest.MonkeyPatch, trace: Trace) -> None:
    """Checkpoints without tensors, and exports that are noted."""

    def save(of: Any, directory: Path) -> None:
        trace.given["save"].append(directory)
        directory.mkdir(parents=True, exist_ok=True)

    def load(of: Any, directory: Path, *, with_optimizer: bool) -> None:
        trace.given["load"].append((directory, with_optimizer))

    def write(of: Any, directory: Path, **options: Any) -> None:
        trace.given["export"].append({"directory": directory, **options})

    class Average:
        """In the place of averaged weights."""

        def __init__(self, of: Any, decay: float) -> None:
            trace.given["ema"].append(decay)

        def update(self) -> None: ...

        def save(self, directory: Path) -> None: ...

        def load(self, directory: Path) -> None: ...

        in_place = contextlib.nullcontext

    patch.setattr(average, "WeightAverage", Average)
    patch.setattr(assembly, "WeightAverage", Average)
    patch.setattr(checkpoint, "save_engine", save)
    patch.setattr(checkpoint, "load_engine", load)
    patch.setattr(export, "export_hf", write)


class FakeWeights:
    """The table of weights, which loads none."""

    def __init__(self, chunks: Any, arch: Any, hf: Any, ranks: Ranks, *, head: str) -> None:
        self.arch, self.hf, self.head, self.local, self.loaded = arch, hf, head, list[Any](), list[str]()

    def load(self, source: Any) -> None:
        self.loaded.append(source.directory.name)


class FakeAdapters:
    """What adapters are made of; there are none."""

    def __init__(self, chunks: Any, weights: Any, options: Any, *, seed: int) -> None:
        self.options = options

    off = staticmethod(contextlib.nullcontext)


class FakeRouters:
    """Statistics of routers that there are none of."""

    def __init__(self, *args: Any) -> None: ...

    def start(self) -> None: ...

    def metrics(self, *args: Any) -> dict[str, float]:
        return {}


class FakeFp8Layers:
    """Layers that always round the same numbers: of 200 one is cut, and the largest is 8."""

    def __init__(self, chunks: Any, options: Any) -> None:
        self.options, self.on, self.trains, self.num_rounded = options, False, False, 0

    def take_statistics(self) -> Statistics:
        return Statistics(amax=8.0, saturated=1, total=200)

    def settle(self) -> None: ...

    def round_weights(self) -> None:
        self.num_rounded += 1


class FakeSharedWeights:
    """One block, never renewed."""

    def __init__(self, of: Any) -> None:
        self.blocks = [types.SimpleNamespace(num_bytes=8)]

    def refresh(self) -> list[bytes]:
        return [b"digest"]


class FakeSentWeights:
    """Two MiB without numbers, which nobody takes."""

    def __init__(self, trace: Trace, of: Any) -> None:
        self._trace = trace
        index = (slice(0, 2), slice(0, 2**20))
        piece = Piece(name="w", shape=(2, 2**20), index=index, offset=0, size=(2, 2**20), stride=(2**20, 1))
        self.blocks = [Block(length=2**21, dtype=torch.uint8, pieces=(piece,))]

    def join(self, buckets: Any, place: Any, *, num_senders: int | None) -> None:
        self._trace.given["buckets"].append(len(buckets))

    def send(self, version: int) -> str:
        return ""


def build_model(arch: Any, hf: Any, ranks: Ranks, options: Any, *, head: str, seed: int) -> tuple[list[Any], Any]:
    """Megatron-Core's configuration as it is, and chunks of nothing."""
    config = transformer_config(arch, hf, ranks, options)
    config.drawn_from = seed  # not a field of Megatron-Core's: what a head that is drawn is drawn from
    config.kernels = options.kernels  # nor this: most of it changes nothing on a CPU
    return [FakeChunk() for _ in range(ranks.vpp_size)], config


def ranks_of(world: dict[str, Any]) -> Ranks:
    """A rank of the last stage that holds results."""
    tp, pp, cp = world["tensor"], world["pipeline"], world["context_parallel_size"]
    dp = world["world_size"] // (tp * pp * cp)
    rank = world["rank"] % dp
    return Ranks(
        **{"world_rank": world["rank"], "world_size": world["world_size"]},
        **{"tp_rank": 0, "tp_size": tp, "pp_rank": pp - 1, "pp_size": pp, "cp_rank": 0, "cp_size": cp},
        **{"dp_rank": rank, "dp_size": dp, "replica_rank": rank, "replica_size": dp * cp},
        **{"ep_rank": 0, "ep_size": world["expert_model_parallel_size"], "etp_rank": 0},
        etp_size=world["expert_tensor_parallel_size"] or tp,
        **{"expert_replica_rank": 0, "expert_replica_size": 1},
        vpp_size=world["virtual_pipeline_model_parallel_size"] or 1,
    )


@contextlib.contextmanager
def watched(trace: Trace) -> Iterator[None]:
    """Keep what the program prints, warns of, and stops with."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            trace.warnings.append(record.getMessage())

    handler, said = Keep(logging.WARNING), io.StringIO()
    logging.getLogger("megarlhf").addHandler(handler)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except (ValueError, RuntimeError) as error:
        trace.error = f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("megarlhf").removeHandler(handler)
        trace.said = said.getvalue()
