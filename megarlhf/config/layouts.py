"""How models are cut, and what their layers are computed with: options beside those of arguments.py."""

from dataclasses import dataclass
from typing import Literal

TransformerImpl = Literal["local", "transformer_engine"]


@dataclass(frozen=True, kw_only=True)
class LayoutArguments:
    """How the model and its work are split over ranks (Megatron-Core)."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (TP). Divides the attention heads and the KV heads."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages the layers are split into (PP). Divides the number of layers."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Chunks of layers on each pipeline rank (VPP), computed in turns so that ranks idle less. Needs PP above 1.
    None: one."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage. None: as many as every other stage."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage, which computes the logits as well. None: as many as every other stage."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    cp_comm_type: Literal["p2p", "all_gather"] = "p2p"
    """How context-parallel ranks see each other's keys and values: they travel around a ring, or all are gathered."""
    expert_model_parallel_size: int = 1
    """Ranks the experts of a layer are dealt to (EP), out of the tensor-, context- and data-parallel ones."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices (ETP). None: as many as TP."""
    sequence_parallel: bool = False
    """Split the activations between matrices over the tensor-parallel ranks as well. Needs TP above 1."""
    use_distributed_optimizer: bool = True
    """Split optimizer state and fp32 master weights over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather parameters from data-parallel ranks while the next forward pass already runs."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass to save memory: full is whole layers, selective attention only."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full granularity: uniform recomputes all layers in chunks, block only the first layers of each stage."""
    recompute_num_layers: int | None = None
    """With full granularity: layers in a chunk (uniform) or layers recomputed on each stage (block)."""
    distributed_timeout_minutes: float = 10.0
    """Minutes a collective waits for a missing rank before the run stops."""

    @property
    def virtual_stages(self) -> int:
        """Chunks of layers on each pipeline rank."""
        return self.num_virtual_stages_per_pipeline_rank or 1


@dataclass(frozen=True, kw_only=True)
class CriticLayoutArguments:
    """The critic's own layout (gae only). What is left out is as the actor's."""

    critic_tensor_model_parallel_size: int | None = None
    """Ranks that share each layer's matrices. Where it or the experts' ranks are given, the actor's
    expert_tensor_parallel_size does not count for the critic."""
    critic_pipeline_model_parallel_size: int | None = None
    """Pipeline stages. Where it is given, the actor's virtual and uneven stages do not count for the critic."""
    critic_num_virtual_stages_per_pipeline_rank: int | None = None
    """Chunks of layers on each pipeline rank."""
    critic_decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage."""
    critic_decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage."""
    critic_context_parallel_size: int | None = None
    """Ranks that share each sequence."""
    critic_expert_model_parallel_size: int | None = None
    """Ranks the experts of a layer are dealt to."""
    critic_expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices."""
    critic_sequence_parallel: bool | None = None
    """Split activations over tensor-parallel ranks. None: as the actor, where the critic's TP is above 1."""


@dataclass(frozen=True, kw_only=True)
class RewardLayoutArguments:
    """The layout of reward models: one value for all of them, or one for each with commas between them. What is left
    out is as the actor's."""

    reward_tensor_model_parallel_size: tuple[int, ...] | None = None
    """Ranks that share each layer's matrices. Where it or the experts' ranks are given, the actor's
    expert_tensor_parallel_size does not count."""
    reward_pipeline_model_parallel_size: tuple[int, ...] | None = None
    """Pipeline stages. Where it is given, the actor's virtual and uneven stages do not count."""
    reward_num_virtual_stages_per_pipeline_rank: tuple[int, ...] | None = None
    """Chunks of layers on each pipeline rank."""
    reward_decoder_first_pipeline_num_layers: tuple[int, ...] | None = None
    """Layers of the first pipeline stage."""
    reward_decoder_last_pipeline_num_layers: tuple[int, ...] | None = None
    """Layers of the last pipeline stage."""
    reward_context_parallel_size: tuple[int, ...] | None = None
    """Ranks that share each sequence; above 1 its samples do not share their prompt."""
    reward_expert_model_parallel_size: tuple[int, ...] | None = None
    """Ranks the experts of a layer are dealt to."""
    reward_expert_tensor_parallel_size: tuple[int, ...] | None = None
    """Ranks that share each expert's matrices."""
    reward_sequence_parallel: tuple[bool, ...] | None = None
    """Split activations over tensor-parallel ranks. None: as the actor, where the model's TP is above 1."""


@dataclass(frozen=True, kw_only=True)
class KernelArguments:
    """What layers are computed with. Fusions are used where what they need is installed; the start log says so."""

    transformer_impl: TransformerImpl | None = None
    """Megatron-Core's layers over PyTorch alone (local) or TransformerEngine's (GPUs only).
    None: transformer_engine on GPUs, local elsewhere."""
    rope_fusion: bool = True
    """Turn packed queries and keys by one kernel of TransformerEngine."""
    gradient_accumulation_fusion: bool = True
    """Add weight gradients to their fp32 sums inside the matrix product (apex)."""
    bias_swiglu_fusion: bool = True
    """Compute the gated activation of feed-forward layers as one compiled function (GPUs only)."""
    bias_dropout_fusion: bool = True
    """Add a layer's output to the residual as one compiled function (GPUs only)."""
