"""What the layers' implementation cannot do, known once the kind of the devices is.

Read in TransformerEngine 2.11, pytorch/attention/dot_product_attention: utils.py:439, 450 and 459 (its fused and flash
attention take no float32), utils.py:756 (its unfused one no context parallelism), context_parallel.py:2842 (all-gather
takes no packed sequences, and every line here is packed). Every function returns sentences and raises nothing.
"""

from collections.abc import Sequence

from megarlhf.config.check_layout import broken
from megarlhf.config.layouts import LayoutArguments, TransformerImpl

_LOCAL = "set transformer_impl=local"
_FORGOTTEN = {"layernorm", "moe_act", "mla_up_proj"}  # modules whose output is not kept, but computed again
_RECOMPUTED = _FORGOTTEN | {"core_attn", "mlp", "moe", "shared_experts"}


def kernel_errors(
    impl: TransformerImpl,
    layouts: Sequence[tuple[str, LayoutArguments]],
    *,
    bf16: bool,
    share_prompt_prefix: bool,
    recompute_modules: Sequence[str] | None = None,
    load_in_4bit: bool = False,
    offload_fraction: float = 1.0,
    fused_adam: bool = True,
) -> list[str]:
    """What keeps the layers from computing as asked.

    Args:
        layouts: each with the prefix of its options, such as "" or "critic_".
        share_prompt_prefix: as it was asked for, or decided.
        recompute_modules: what selective recomputation recomputes; None: attention, as Megatron-Core has it.
        offload_fraction: part of the optimizer that is on the host.
        fused_adam: the devices have an AdamW that is not PyTorch's, which the host has; or they are the host.
    """
    errors = _recompute_errors(impl, layouts, recompute_modules)
    if offload_fraction < 1 and not fused_adam:
        errors.append(
            f"optimizer_offload_fraction={offload_fraction} without TransformerEngine or apex (Megatron-Core tells the "
            "device's AdamW from the host's by its class when it loads): install one, or leave it out for 1"
        )
    if impl == "local":
        return errors
    for prefix, layout in layouts:
        size = layout.context_parallel_size
        errors += broken(
            {
                f"bf16=False with {prefix}context_parallel_size={size} (of TransformerEngine's attention only the part "
                f"without context parallelism computes in fp32): set bf16, or {_LOCAL}": size > 1 and not bf16,
                f"cp_comm_type=all_gather with {prefix}context_parallel_size={size} (TransformerEngine's takes no "
                f"packed sequences, and all lines are packed): set cp_comm_type=p2p, or {_LOCAL}": (
                    size > 1 and layout.cp_comm_type == "all_gather"
                ),
            }
        )
    recomputes = bf16 and any(layout.recompute_granularity == "selective" for _, layout in layouts)
    return errors + broken(
        {
            "share_prompt_prefix=True with transformer_impl=transformer_engine (its attention has no mask of a shared "
            f"prompt): leave it out, or {_LOCAL}": share_prompt_prefix,
            "load_in_4bit=True with transformer_impl=transformer_engine (its layers hold weights whole): leave it "
            f"out, or {_LOCAL}": load_in_4bit,
            "recompute_granularity=selective with recompute_modules=core_attn saves nothing (TransformerEngine's fused "
            "and flash attention keep queries, keys, values and their output, which recomputing it keeps too): set "
            "recompute_granularity=full, or recompute_modules to others, such as mlp or moe": (
                recomputes and set(recompute_modules or ("core_attn",)) == {"core_attn"}
            ),
        }
    )


def _recompute_errors(
    impl: TransformerImpl, layouts: Sequence[tuple[str, LayoutArguments]], modules: Sequence[str] | None
) -> list[str]:
    """Megatron-Core forgets an output and restores it (tensor_parallel/random.py:589) with TransformerEngine only."""
    if modules is None:
        return []
    shown = f"recompute_modules={' '.join(modules)}"
    if not any(layout.recompute_granularity == "selective" for _, layout in layouts):
        return [f"{shown} is ignored without recompute_granularity=selective: set that, or leave it out"]
    unknown, forgotten = sorted(set(modules) - _RECOMPUTED), sorted(_FORGOTTEN.intersection(modules))
    return broken(
        {
            f"{shown} names {' '.join(unknown) or 'nothing'}, not Megatron-Core's: use "
            f"{', '.join(sorted(_RECOMPUTED))}": unknown or not modules,
            f"{shown} with transformer_impl=local ({' and '.join(forgotten)} need TransformerEngine in Megatron-Core): "
            "leave them out": impl == "local" and forgotten,
        }
    )


def kernel_warnings(impl: TransformerImpl, *, bf16: bool) -> list[str]:
    """What is legal and slow."""
    said = (
        "bf16=False: TransformerEngine's fused and flash attention have no fp32, so its unfused one computes, which "
        "holds all scores of a line: set bf16, or transformer_impl=local"
    )
    return [] if impl == "local" or bf16 else [said]
