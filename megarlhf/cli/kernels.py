"""What computes the layers of a run, decided once the kind of its devices is known, and said."""

import sys
from collections.abc import Mapping, Sequence

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_kernels import kernel_errors, kernel_warnings
from megarlhf.config.checks import raise_if
from megarlhf.config.layouts import KernelArguments, LayoutArguments, TransformerImpl
from megarlhf.config.supervised_arguments import ParityConfig, SFTConfig
from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.backend import model_backend, resolve_transformer_impl
from megarlhf.models.registry import find_architecture
from megarlhf.parallel.device import DeviceKind


def resolve_kernels(
    config: PPOConfig | SFTConfig | ParityConfig,
    layouts: Mapping[str, LayoutArguments],
    *,
    share_prompt_prefix: bool,
    device: DeviceKind,
) -> TransformerImpl:
    """What computes the layers on these devices; what is legal and slow is said on stderr.

    Args:
        layouts: by the prefix of their options.
    Raises:
        ConfigError: it is not installed, or cannot compute as asked.
    """
    bf16, impl = config.model.bf16, resolve_transformer_impl(config.kernels.transformer_impl, device=device)
    modules = config.passed.megatron.get("recompute_modules")
    raise_if(
        kernel_errors(impl, layouts, bf16=bf16, share_prompt_prefix=share_prompt_prefix, recompute_modules=modules)
    )
    for warning in kernel_warnings(impl, bf16=bf16):
        print(f"warning: {warning}", file=sys.stderr)
    return impl


def kernel_lines(kernels: KernelArguments, models: Sequence[HFConfig], *, device: DeviceKind) -> str:
    """What each model is computed with, in lines for the start log; models that agree share theirs."""
    backends = (model_backend(find_architecture(model), model, kernels, device=device) for model in models)
    return "\n".join(dict.fromkeys("\n".join(backend.lines()) for backend in backends))
