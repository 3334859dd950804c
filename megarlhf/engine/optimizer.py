"""Megatron-Core's optimizer and learning-rate schedule for one model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    HybridDeviceOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megarlhf.config.arguments import SharedOptimizerArguments
from megarlhf.engine.objective import NonFiniteError
from megarlhf.models.build import passed_fields
from megarlhf.parallel.device import current_device


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(SharedOptimizerArguments):
    """AdamW with clipping and a warm-up, then a cosine to a floor."""

    learning_rate: float
    total_steps: int  # optimizer steps of the whole run
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False  # reduce gradients during the backward pass
    overlap_param_gather: bool = False  # gather parameters during the next forward pass; distributed optimizer only
    passed: Mapping[str, Any] = field(default_factory=dict)  # fields of OptimizerConfig, and others to pass over


class FiniteOptimizer(ChainedOptimizer):
    """Megatron-Core's optimizers together, whose step refuses a gradient that is not finite; their own would take it.

    The step calls `get_grad_norm` once, whether it clips or not, before it changes a weight.
    """

    def get_grad_norm(self) -> float:
        """L2 norm of the whole reduced gradient, the same on every rank; all of them call it.

        Raises:
            NonFiniteError: it is NaN or infinite on some rank; raised on every rank.
        """
        norm = float(super().get_grad_norm())
        # Without the distributed optimizer each data-parallel rank takes the norm of its own copy of the gradient.
        finite = torch.tensor(float(math.isfinite(norm)), device=current_device())
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.item():  # where this rank's own is, another's is not
            raise NonFiniteError(f"gradient norm {math.nan if math.isfinite(norm) else norm}")
        return norm


def wrap_chunks(chunks: Sequence[Any], config: Any, options: OptimizerOptions) -> list[Any]:
    """Chunks whose gradients are reduced in float32 over data-parallel ranks; `config`, the model's, learns of it."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        average_in_collective=False,
        check_for_nan_in_grad=False,
    )
    # Megatron-LM's choice: buckets, which overlap communication with the backward pass, for the first chunk alone
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]
    if options.overlap_grad_reduce:
        no_syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_syncs[0] if len(no_syncs) == 1 else no_syncs  # Megatron-Core's convention
    return wrapped


def build_optimizer(chunks: list[Any], options: OptimizerOptions, *, bf16: bool) -> Any:
    """Megatron-Core's optimizer over DistributedDataParallel chunks; float32 main parameters under bf16.

    What steps on the host holds them itself, as Megatron-Core calls precision-aware.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.learning_rate,
        min_lr=options.learning_rate * options.min_lr_ratio,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_precision_aware_optimizer=options.optimizer_cpu_offload,
        **passed_fields(OptimizerConfig, vars(options)),  # of the same names there: AdamW's, clip_grad, overlap, ...
        **passed_fields(OptimizerConfig, options.passed),
    )
    return FiniteOptimizer(get_megatron_optimizer(config, chunks).chained_optimizers)


def single_optimizers(optimizer: Any) -> list[Any]:
    """Megatron-Core's optimizers of parameters that are stepped alike; none where there is no optimizer."""
    return [] if optimizer is None else optimizer.chained_optimizers


def optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """What the optimizer steps (parameters, or main weights beside them, or its shards of either) and remembers.

    What it steps on the host is left out.
    """
    for single in single_optimizers(optimizer):
        inner = single.optimizer
        if isinstance(inner, HybridDeviceOptimizer):
            inner = inner.gpu_optimizer
        if inner is not None:  # None: this rank steps none of these
            for group in inner.param_groups:
                yield from group["params"]
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def hook_gradients(chunks: Sequence[Any]) -> None:
    """Let Megatron-Core's wrapped chunks, if they are, see the gradients of their parameters again.

    PyTorch forgets the node that has their hooks where a parameter's data was of another dtype or device for a while.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel):
            hooked, chunk.grad_accs = set(chunk.grad_accs), []
            for parameter in chunk.module.parameters():
                if parameter.requires_grad:
                    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
                    if node not in hooked:
                        node.register_hook(chunk._make_backward_post_hook(parameter))
                    chunk.grad_accs.append(node)


def empty_wrappers(chunks: list[Any]) -> None:
    """Part each wrapped chunk from its hooks on gradients, which hold it and are held by it.

    The model's memory and its groups' threads then end with the engine. The garbage collector would find them late,
    since it looks at old objects rarely, or never, since a worker freezes them.
    """
    for chunk in chunks:
        chunk.__dict__.clear()


def main_weight(optimizer: Any, parameter: Any) -> Tensor:
    """The float32 weight that the optimizer steps, whole, in the parameter's shape.

    With the distributed optimizer each rank holds a part; all ranks that share the parameter call it together, after
    the engine's `finish_param_gather()`.
    """
    if parameter.dtype == torch.float32:
        return parameter.data
    if not optimizer.config.use_distributed_optimizer:
        return parameter.main_param.data
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    for holder in optimizer.chained_optimizers:  # none where all of it lies on other ranks
        if parameter in getattr(holder, "model_param_gbuf_map", ()):
            held = holder._get_model_param_range_map(parameter)["param"]
            whole[held.start : held.end] = _main_part(holder, parameter).data
    if getattr(parameter, "allreduce", True):
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    else:
        group = parallel_state.get_expert_data_parallel_group()
    dist.all_reduce(whole, group=group)
    return whole.view_as(parameter)


def _main_part(holder: Any, parameter: Any) -> Tensor:
    """This rank's part of a parameter's float32 weight."""
    group, order = holder.model_param_group_index_map[parameter]
    stepped: Tensor = holder.optimizer.param_groups[group]["params"][order]
    is_hybrid = isinstance(holder.optimizer, HybridDeviceOptimizer)
    return holder.optimizer.param_to_inner_param[stepped] if is_hybrid else stepped


def build_scheduler(optimizer: Any, options: OptimizerOptions) -> OptimizerParamScheduler:
    """Learning rate of optimizer step k (from 1): linear over the warm-up, then the decay style to the floor.

    Call `.step(1)` before each optimizer step, so that no step runs at learning rate 0.
    """
    total = max(1, options.total_steps)
    warmup = min(math.ceil(total * options.lr_warmup_ratio), total - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.learning_rate,
        min_lr=options.learning_rate * options.min_lr_ratio,
        lr_warmup_steps=warmup,
        lr_decay_steps=total,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=total,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a loaded state gives the number of steps, these options the rest
    )
