"""Megatron-Core's optimizer and learning-rate schedule for one model."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW with clipping and a warm-up, then a cosine to a floor."""

    learning_rate: float
    total_steps: int  # optimizer steps of the whole run
    lr_warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.1
    lr_decay_style: Literal["cosine", "constant"] = "cosine"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False  # reduce gradients during the backward pass
    overlap_param_gather: bool = False  # gather parameters during the next forward pass; distributed optimizer only


def build_optimizer(chunks: list[Any], options: OptimizerOptions, *, bf16: bool) -> Any:
    """Megatron-Core's optimizer over DistributedDataParallel chunks; float32 main parameters under bf16."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.learning_rate,
        min_lr=options.learning_rate * options.min_lr_ratio,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
    )
    return get_megatron_optimizer(config, chunks)


def build_scheduler(optimizer: Any, options: OptimizerOptions) -> OptimizerParamScheduler:
    """Learning rate of optimizer step k (from 1): linear over the warm-up, then the decay style to the floor.

    Call `.step(1)` before each optimizer step, so that no step runs at learning rate 0.
    """
    warmup = min(math.ceil(options.total_steps * options.lr_warmup_ratio), options.total_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.learning_rate,
        min_lr=options.learning_rate * options.min_lr_ratio,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(1, options.total_steps),
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=max(1, options.total_steps),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a loaded state gives the number of steps, these options the rest
    )
