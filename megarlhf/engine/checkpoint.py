"""One role's weights, optimizer and schedule in Megatron-Core's distributed checkpoint format (torch_dist).

A checkpoint can be loaded under another tensor, pipeline or data-parallel layout. What makes it complete or not is
the business of formats/run_checkpoints.
"""

import io
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.optimizer import single_optimizers
from megarlhf.formats.run_checkpoints import SaveFailedError
from megarlhf.parallel.device import current_device
from megarlhf.parallel.megatron_versions import written_by_rank_0

# Megatron-Core would start a manager process per rank, seconds each, for results of background saves. Saves here are
# synchronous: results come back inside the process.
assert hasattr(filesystem_async, "_results_queue")
filesystem_async._results_queue = queue.Queue()


def _load_bytes(planner: MCoreLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """What is no tensor, with weights_only; PyTorch's own planner would run whatever the pickle names."""
    name = read_item.dest_index.fqn
    with torch.serialization.safe_globals([io.BytesIO]):
        loaded = torch.load(value, weights_only=True)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], loaded)
    else:
        planner.state_dict[name] = loaded


assert hasattr(MCoreLoadPlanner, "load_bytes")
MCoreLoadPlanner.load_bytes = _load_bytes

_UNREADABLE = (dist_checkpointing.core.CheckpointingException, CheckpointException, KeyError, FileNotFoundError)
_ADAPTERS = "adapters"  # with LoRA, in the place of the model: what is trained alone
_HAS_MOMENTS = "optimizer_has_state"
_PRECISION = "precision"  # scales and fallbacks of FP8
_SETTINGS = ("max_lr", "min_lr", "betas", "eps", "weight_decay", "fused")  # of an optimizer's parameter group


def _chunks(engine: MegatronEngine) -> dict[str, Any]:
    """Chunks under Megatron-LM's keys; what is on disk is named by layer, whatever the chunks."""
    one = len(engine.chunks) == 1
    return {"model" if one else f"model{number}": chunk for number, chunk in enumerate(engine.chunks)}


def _sharding(engine: MegatronEngine) -> dict[str, Any]:
    """How state is cut; what is stepped on the host is gathered there, for the one replica that writes it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": (
            engine.optimizer is not None and engine.optimizer.config.optimizer_cpu_offload
        ),
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _weights(engine: MegatronEngine) -> dict[str, Any]:
    """What is trained: all weights, or the adapters."""
    if engine.adapters is not None:
        return {_ADAPTERS: engine.adapters.sharded_state()}
    return {key: chunk.sharded_state_dict(metadata=_sharding(engine)) for key, chunk in _chunks(engine).items()}


def _state(engine: MegatronEngine, *, loading: bool, with_optimizer: bool) -> dict[str, Any]:
    state = _weights(engine)
    if engine.optimizer is not None:
        state["scheduler"] = engine.scheduler.state_dict()
        state[_HAS_MOMENTS] = with_optimizer
    if with_optimizer:
        # torch's AdamW has no state before its first step, and Megatron-Core needs tensors to load into
        for single in single_optimizers(engine.optimizer) if loading else ():
            if hasattr(single, "_init_optimizer_states_with_dummy_values"):
                single._init_optimizer_states_with_dummy_values()
        state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=loading, metadata=_sharding(engine))
    return state


def _has_moments(engine: MegatronEngine) -> bool:
    """Whether the optimizer has made a step since it was built or loaded: before, it has no state to save."""
    stepped = any(single.optimizer.state for single in single_optimizers(engine.optimizer))
    found = torch.tensor(float(stepped), device=current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)  # a rank's own shard may be empty
    return bool(found.item())


@contextmanager
def agreed_write() -> Iterator[None]:
    """Around files that one rank writes or all; every rank enters, and leaves when all have written.

    Raises:
        SaveFailedError: on every rank, where one could not write.
    """
    own = list[str]()
    try:
        yield
    except OSError as error:
        own = [f"rank {dist.get_rank()}: {error}"]
    except CheckpointException as error:  # on all ranks, and the first one knows whose it is
        own = [f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()]
    all_of_them: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(all_of_them, own)
    if said := [text for texts in all_of_them for text in texts]:
        raise SaveFailedError("; ".join(said))


@contextmanager
def _rank_0_goes_on() -> Iterator[None]:
    """Let rank 0 take part in all collectives of the block, also where it cannot write its own files; then raise."""
    errors = list[Exception]()

    def going_on(write: Callable[..., None]) -> Callable[..., None]:
        def tried(*args: Any, **options: Any) -> None:
            try:
                write(*args, **options)
            except (OSError, RuntimeError) as error:  # RuntimeError: of torch.save
                errors.append(error)

        return tried

    with ExitStack() as undoing:
        for owner, name in written_by_rank_0():
            undoing.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, going_on(getattr(owner, name)))
        yield
    if errors:
        raise OSError(str(errors[0]).splitlines()[0]) from errors[0]


def _save(state: dict[str, Any], directory: Path) -> None:
    """Write a state dict; see agreed_write."""
    with agreed_write():
        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
    with agreed_write(), _rank_0_goes_on():
        dist_checkpointing.save(state, str(directory), validate_access_integrity=True)


def save_weights(engine: MegatronEngine, directory: Path) -> None:
    """Write what the parameters are now into `directory`; every rank of the role calls it.

    Raises:
        SaveFailedError: on every rank, where one could not write.
    """
    _save(_weights(engine), directory)


def load_weights(engine: MegatronEngine, directory: Path) -> None:
    """Fill the parameters with what `save_weights` has written in any layout.

    Raises:
        ValueError: the directory does not hold this model.
    """
    try:
        state = dist_checkpointing.load(_weights(engine), str(directory))
    except _UNREADABLE as error:
        raise ValueError(f"load={directory}; it does not hold this model: {error}") from error
    _fill(engine, state)


def _fill(engine: MegatronEngine, state: dict[str, Any]) -> None:
    if engine.adapters is not None:
        for tensor in engine.adapters.tensors():
            tensor.parameter.data.copy_(state[_ADAPTERS][tensor.name])
        return
    for key, chunk in _chunks(engine).items():
        chunk.load_state_dict(state[key], strict=True)


def save_engine(engine: MegatronEngine, directory: Path) -> None:
    """Write one role's state into `directory`; every rank of the role calls it.

    Raises:
        SaveFailedError: on every rank, where one could not write.
    """
    engine.finish_param_gather()
    state = _state(engine, loading=False, with_optimizer=_has_moments(engine))
    state[_PRECISION] = engine.precision.state()
    _save(state, directory)


def load_engine(engine: MegatronEngine, directory: Path, *, with_optimizer: bool = True) -> None:
    """Fill an engine, built from the same architecture in any layout, from `directory`.

    Learning rates and the optimizer's other settings are the engine's own: a changed configuration counts.

    Args:
        with_optimizer: take the optimizer's running means as well; the schedule goes on in any case.
    Raises:
        ValueError: the checkpoint does not hold this model.
    """
    try:
        saved = dist_checkpointing.load_common_state_dict(str(directory))
        with_optimizer = with_optimizer and engine.optimizer is not None and saved[_HAS_MOMENTS]
        state = dist_checkpointing.load(_state(engine, loading=True, with_optimizer=with_optimizer), str(directory))
    except _UNREADABLE as error:
        raise ValueError(f"load={directory}; it does not hold this model: {error}") from error
    _fill(engine, state)
    engine.precision.load_state(saved.get(_PRECISION))
    if engine.optimizer is None:
        return
    if with_optimizer:
        settings = [{key: group[key] for key in _SETTINGS if key in group} for group in engine.optimizer.param_groups]
        engine.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
            group.update(own)
    else:
        engine.optimizer.reload_model_params()
    engine.scheduler.load_state_dict(state["scheduler"])
