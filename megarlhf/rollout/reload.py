"""vLLM's layerwise reload: new weights through its own loaders, which shard, convert and process them.

It keeps the tensors of a layer until the last has come, so they should come layer by layer: then it never keeps more
than the experts of one layer. Rows that pad a vocabulary never come; without `expect_no_padding` the embedding and the
head would be kept to the end.

vLLM 0.32's reload leaves two things wrong on a CPU. The kernel of a tied output head is packed when the model is first
loaded and never again: `repack_output_heads` does it after every update. Experts' weights are packed at the first load
and merely copied at a reload, unpacked, over the packed ones: `forget_expert_kernels` makes each load a first one.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform


def reload_weights(model: nn.Module, model_config: ModelConfig, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Replace all weights of a model by tensors with Hugging Face names, which are its own from now on.

    Raises:
        RuntimeError: weights of the model are not among them, and it is left with a mixture. So it is after any error
            of `tensors`; a later reload mends it.
    """
    expected = {name for name, _ in model.named_parameters()}
    load_weights: Any = model.load_weights
    forget_expert_kernels(model)
    initialize_layerwise_reload(model)
    expect_no_padding(model)
    try:
        loaded = load_weights(tensors)
    finally:
        finalize_layerwise_reload(model, model_config)
    if missing := sorted(expected - loaded):
        raise RuntimeError(f"what was sent lacks weights of the model: {', '.join(missing[:8])}")
    repack_output_heads(model)


def repack_output_heads(model: nn.Module) -> None:
    """Rebuild the CPU kernel of each output head from its current weight, which it may share with the embedding.

    A model without a head of its own (Gemma 2) computes logits with its embedding.
    """
    if current_platform.is_cpu():
        embeddings = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
        for module in [m for m in embeddings if isinstance(m, ParallelLMHead)] or embeddings:
            vars(module).pop("cpu_linear", None)  # frees the old kernel first: the new one can have its memory
            module.quant_method.process_weights_after_loading(module)


def forget_expert_kernels(model: nn.Module) -> None:
    """Let the next load of each layer's experts pack their weights for the CPU again."""
    if current_platform.is_cpu():
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None


def expect_no_padding(model: nn.Module) -> None:
    """Let a reload that has begun count an embedding or head as complete without the rows that pad its vocabulary."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            weight: Any = module.weight
            weight.weight_loader_numel = module.shard_indices.num_org_elements * weight.shape[1]
