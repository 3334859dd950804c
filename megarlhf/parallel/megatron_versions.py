"""What differs between the two Megatron-Core versions that the tests run with, 0.16.1 and 0.19.2: all of it is here."""

from functools import partial
from importlib.metadata import version
from typing import Any

NEWER = tuple(int(part) for part in version("megatron-core").split(".")[:2]) >= (0, 19)

# The interleaved schedule of 0.16 frees a stage's output while gloo still sends it; 0.19 waits for the copy.
FREES_UNSENT_OUTPUTS = not NEWER


def ranks_in_balance_loss(tp_size: int, cp_size: int) -> int:
    """Ranks whose tokens Megatron-Core does not count when it weighs a micro-batch's load-balancing loss by its tokens.

    Each rank's router sees its own part of a sequence. 0.16 multiplies by that part's tokens, 0.19 by all of them.
    """
    return 1 if NEWER else tp_size * cp_size


class LatentLayersAsNamed:
    """Latent attention with the layers that its spec names, beside MLASelfAttention.

    0.19 asks this method for them, and by itself would norm queries that have no latent; 0.16 never calls it.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def class_and_submodules(layer: Any) -> tuple[Any, Any]:
    """Of a layer of a model's specification: a ModuleSpec in 0.16, for some layers a partial of the class in 0.19."""
    if isinstance(layer, partial):
        return layer.func, layer.keywords["submodules"]
    return layer.module, layer.submodules


def bind_router_product(moe_utils: Any) -> None:
    """Without TransformerEngine 0.16 never binds a name that its router's product asks for; 0.19 does."""
    if not NEWER:
        moe_utils.te_general_gemm = None


def balance_losses() -> dict[str, Any]:
    """What Megatron-Core notes of load-balancing losses for a log, by name, with the groups to sum over."""
    if NEWER:
        from megatron.core.transformer.moe import moe_logging

        return moe_logging.get_moe_metrics_tracker().metrics
    from megatron.core.transformer.moe import moe_utils

    return moe_utils.get_moe_layer_wise_logging_tracker()


def written_by_rank_0() -> list[tuple[Any, str]]:
    """Owners and names of what rank 0 calls alone to write a checkpoint, while the others wait in a collective.

    0.16 writes what is no tensor on its own, 0.19 with the shards.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async

    owners = [(filesystem_async.FileSystemWriterAsync, "finish"), (serialization, "save_config")]
    return owners if NEWER else [*owners, (common.TorchCommonSaveStrategy, "save_common")]
