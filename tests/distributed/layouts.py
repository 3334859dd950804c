"""Layouts under test, and engines built in them inside a rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megarlhf.config.layouts import KernelArguments, LayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.config.precision import PrecisionArguments
from megarlhf.data.planning import PackingOptions
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.optimizer import OptimizerOptions
from megarlhf.models.build import ModelOptions
from megarlhf.parallel.groups import ParallelSizes, destroy_groups, initialize_groups
from megarlhf.parallel.truncation import Truncation


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to cut a model."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    virtual: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    sequence_parallel: bool = False
    cp_comm_type: Literal["p2p", "all_gather"] = "p2p"
    distributed_optimizer: bool = False
    overlap: bool = False
    share_prefix: bool = False
    max_tokens: int = 64
    bf16: bool = False
    recompute: Literal["full", "selective"] | None = None
    moe_aux_loss_coeff: float = 0.0
    precision: PrecisionArguments = PrecisionArguments()
    compiled: bool = False  # Megatron-Core's small functions, which only GPUs compile

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


SINGLE = Layout()
LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "DP2-distopt": Layout(data=2, distributed_optimizer=True),
    "DP2": Layout(data=2),
    "TP2-PP2": Layout(tensor=2, pipeline=2),
    "TP2-SP-DP2-distopt": Layout(tensor=2, sequence_parallel=True, data=2, distributed_optimizer=True),
    "PP2-DP2-distopt": Layout(pipeline=2, data=2, distributed_optimizer=True),
    "large-micro-batch": Layout(max_tokens=512),
    "unpacked": Layout(max_tokens=20),
    "share-prefix": Layout(share_prefix=True, max_tokens=128),
    "share-prefix-TP2-SP": Layout(share_prefix=True, max_tokens=128, tensor=2, sequence_parallel=True),
    "share-prefix-PP2": Layout(share_prefix=True, max_tokens=128, pipeline=2),
    "recompute-full": Layout(recompute="full"),
    "recompute-selective": Layout(recompute="selective"),
    "PP2-VPP2": Layout(pipeline=2, virtual=2),
    "PP2-uneven": Layout(pipeline=2, first_stage_layers=1),
    "PP3-uneven": Layout(pipeline=3, first_stage_layers=1, last_stage_layers=1),
    "CP2-p2p": Layout(context=2),
    "CP2-all-gather": Layout(context=2, cp_comm_type="all_gather"),
    "DP2-distopt-overlap": Layout(data=2, distributed_optimizer=True, overlap=True),
}
LARGE_LAYOUTS = {
    "TP4": Layout(tensor=4),
    "PP4": Layout(pipeline=4),
    "CP4-p2p": Layout(context=4),
    "CP4-all-gather": Layout(context=4, cp_comm_type="all_gather"),
    "CP3-p2p": Layout(context=3),
    "TP2-SP-CP2": Layout(tensor=2, sequence_parallel=True, context=2),
    "TP2-SP-CP2-all-gather": Layout(tensor=2, sequence_parallel=True, context=2, cp_comm_type="all_gather"),
    "PP2-CP2": Layout(pipeline=2, context=2),
    "CP2-DP2-distopt": Layout(context=2, data=2, distributed_optimizer=True),
    "TP2-PP2-VPP2": Layout(tensor=2, pipeline=2, virtual=2),
    "TP2-SP-PP2-VPP2": Layout(tensor=2, sequence_parallel=True, pipeline=2, virtual=2),
    "PP2-VPP2-DP2-distopt-overlap": Layout(pipeline=2, virtual=2, data=2, distributed_optimizer=True, overlap=True),
    "PP2-VPP2-CP2": Layout(pipeline=2, virtual=2, context=2),
    "TP2-SP-recompute-full-DP2": Layout(tensor=2, sequence_parallel=True, data=2, recompute="full"),
    "TP2-SP-DP2-distopt-overlap": Layout(
        tensor=2, sequence_parallel=True, data=2, distributed_optimizer=True, overlap=True
    ),
    "TP2-SP-PP2-CP2": Layout(tensor=2, sequence_parallel=True, pipeline=2, context=2),
    "TP2-SP-PP2-DP2-distopt": Layout(tensor=2, sequence_parallel=True, pipeline=2, data=2, distributed_optimizer=True),
    "TP2-SP-PP2-VPP2-CP2": Layout(tensor=2, sequence_parallel=True, pipeline=2, virtual=2, context=2),
}
MOE_LAYOUTS = {
    "EP2": Layout(data=2, expert=2),
    "EP2-distopt": Layout(data=2, expert=2, distributed_optimizer=True),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
    "TP2-SP-EP2-ETP1": Layout(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
    "CP2-EP2": Layout(context=2, expert=2),
    "PP2": Layout(pipeline=2),
    "PP2-VPP2": Layout(pipeline=2, virtual=2),
    "DP2-overlap": Layout(data=2, distributed_optimizer=True, overlap=True),
}
WINDOW_LAYOUTS = {  # where a window, a soft cap and norms after each part could go wrong
    name: LAYOUTS[name]
    for name in ("TP2", "TP2-SP", "PP2", "PP2-VPP2", "CP2-p2p", "CP2-all-gather", "DP2-distopt", "share-prefix-TP2-SP")
}
LATENT_LAYOUTS = {  # without TP2: latent attention needs sequence parallelism
    "TP2-SP": MOE_LAYOUTS["TP2-SP"],
    "TP2-SP-EP2-ETP1": MOE_LAYOUTS["TP2-SP-EP2-ETP1"],
    "EP2": MOE_LAYOUTS["EP2"],
    "PP2": MOE_LAYOUTS["PP2"],
    "PP2-VPP2": MOE_LAYOUTS["PP2-VPP2"],
    "CP2-p2p": LAYOUTS["CP2-p2p"],
    "CP2-all-gather": LAYOUTS["CP2-all-gather"],
    "DP2-distopt": LAYOUTS["DP2-distopt"],
    "share-prefix-TP2-SP": LAYOUTS["share-prefix-TP2-SP"],
}
LARGE_MOE_LAYOUTS = {
    "EP4": Layout(data=4, expert=4),
    "EP2-PP2": Layout(data=2, expert=2, pipeline=2),
    "EP2-DP4-distopt": Layout(data=4, expert=2, distributed_optimizer=True),
    "TP2-SP-EP2-ETP2": Layout(tensor=2, sequence_parallel=True, data=2, expert=2, expert_tensor=2),
    "TP2-SP-EP4-ETP1-DP2": Layout(tensor=2, sequence_parallel=True, data=2, expert=4, expert_tensor=1),
    "TP2-SP-CP2-EP2": Layout(tensor=2, sequence_parallel=True, context=2, expert=2),
    "PP2-VPP2-EP2": Layout(pipeline=2, virtual=2, data=2, expert=2),
}


@contextmanager
def world(layout: Layout, rank: int, init_method: str) -> Iterator[None]:
    """Join a world in this layout for the block."""
    sizes = ParallelSizes(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        virtual=layout.virtual,
    )
    initialize_groups(
        sizes, rank=rank, world_size=layout.world_size, init_method=init_method, seed=1, timeout_minutes=2
    )
    try:
        yield
    finally:
        destroy_groups()


def build(
    layout: Layout,
    model_dir: Path,
    *,
    head: str = "lm",
    optimizer: bool = True,
    total_steps: int = 20,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
    options: OptimizerOptions | None = None,
    lora: LoraArguments | None = None,
) -> MegatronEngine:
    """An engine in the present world; `options` are the optimizer's, but for what the layout says."""
    options = options or OptimizerOptions(
        learning_rate=1e-3,
        total_steps=total_steps,
        lr_warmup_ratio=0.0,
        lr_decay_style="constant",
        adam_eps=1e-4,  # large, so that a step is a smooth function of the gradient
    )
    options = replace(
        options,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap,
    )
    return MegatronEngine(
        model_dir,
        head=head,
        model=ModelOptions(
            bf16=layout.bf16,
            moe_aux_loss_coeff=layout.moe_aux_loss_coeff,
            lora=lora or LoraArguments(),
            precision=layout.precision,
            layout=LayoutArguments(
                sequence_parallel=layout.sequence_parallel,
                cp_comm_type=layout.cp_comm_type,
                decoder_first_pipeline_num_layers=layout.first_stage_layers,
                decoder_last_pipeline_num_layers=layout.last_stage_layers,
                recompute_granularity=layout.recompute,
                recompute_method="uniform" if layout.recompute == "full" else None,
                recompute_num_layers=1 if layout.recompute == "full" else None,
            ),
            kernels=KernelArguments(
                transformer_impl="local",
                bias_swiglu_fusion=layout.compiled,
                bias_dropout_fusion=layout.compiled,
            ),
        ),
        packing=PackingOptions(max_tokens=layout.max_tokens, share_prefix=layout.share_prefix),
        optimizer=options if optimizer else None,
        logprob_chunk_tokens=7,  # a micro-batch has several chunks
        temperature=temperature,
        truncation=truncation,
    )
