"""What a model's layers are computed with: Megatron-Core's own or TransformerEngine's, and which fused kernels.

Decided once, from what is installed and the flags, and said in the start log. Nothing falls back in silence: what was
asked for and is not there is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch.nn.functional as F

from megarlhf.config.layouts import KernelArguments, TransformerImpl
from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import ArchSpec
from megarlhf.parallel.device import WEIGHT_GRADIENT_MODULE, DeviceKind

Finder = Callable[[str], Any]  # importlib.util.find_spec: None where there is no such module


class Fusion(NamedTuple):
    """One fused kernel."""

    name: str
    on: bool
    why: str  # what gives it, or what is in the way


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The decision for one model."""

    transformer_impl: TransformerImpl
    fusions: tuple[Fusion, ...]

    def uses(self, name: str) -> bool:
        """Whether a fusion is on."""
        return next(fusion.on for fusion in self.fusions if fusion.name == name)

    def lines(self) -> list[str]:
        """For the start log: the layers' implementation, then a line for each fusion."""
        switches = (f"{fusion.name}: {'on' if fusion.on else 'off'} ({fusion.why})" for fusion in self.fusions)
        return [f"transformer_impl: {self.transformer_impl}", *switches]


def resolve_transformer_impl(
    asked: TransformerImpl | None, *, device: DeviceKind, find: Finder = find_spec
) -> TransformerImpl:
    """The implementation of the layers on this kind of device.

    Raises:
        ValueError: TransformerEngine where it cannot run or is not installed.
    """
    if asked == "local" or (asked is None and device == "cpu"):
        return "local"
    if device == "cpu":
        raise ValueError(
            "transformer_impl=transformer_engine; it computes on GPUs alone, and there is none here: "
            "leave transformer_impl out"
        )
    if find("transformer_engine") is None:
        raise ValueError(
            f"transformer_impl={asked}; on GPUs this means TransformerEngine, which is not installed: install it "
            "(see requirements/), or set transformer_impl=local for layers over PyTorch alone"
        )
    return "transformer_engine"


def model_backend(arch: ArchSpec, hf: HFConfig, options: KernelArguments, *, device: DeviceKind) -> Backend:
    """What a model of this architecture is computed with on this kind of device."""
    fields = arch.megatron_fields(hf)
    swiglu, latent = fields.get("activation_func") is F.silu, bool(fields.get("multi_latent_attention"))
    return decide_backend(options, device=device, swiglu=swiglu, latent=latent)


def decide_backend(
    options: KernelArguments, *, device: DeviceKind, swiglu: bool, latent: bool, find: Finder = find_spec
) -> Backend:
    """What the layers of a model with or without gated SiLU and latent attention are computed with.

    Raises:
        ValueError: TransformerEngine where it cannot run or is not installed.
    """
    impl = resolve_transformer_impl(options.transformer_impl, device=device, find=find)
    engine, gpu = impl == "transformer_engine", device == "gpu"

    def fusion(name: str, flag: str, given: str, *needs: tuple[bool, str]) -> Fusion:
        """On with what gives it, unless one of the needs does not hold or its flag switches it off."""
        missing = [f"needs {text}" for holds, text in needs if not holds]
        if not getattr(options, flag):
            missing = [f"--no-{flag.replace('_', '-')}"]
        return Fusion(name, not missing, missing[0] if missing else given)

    compiled = (gpu, "a GPU: Megatron-Core's small functions are not compiled on a CPU")
    apex = find(WEIGHT_GRADIENT_MODULE) is not None
    return Backend(
        transformer_impl=impl,
        fusions=(
            fusion(
                "apply_rope_fusion",
                "rope_fusion",
                "TransformerEngine's THD kernel",
                (engine, "transformer_impl=transformer_engine"),
                (not latent, "a model without latent attention: Megatron-Core's kernel for that is experimental"),
            ),
            fusion(
                "gradient_accumulation_fusion",
                "gradient_accumulation_fusion",
                f"apex's {WEIGHT_GRADIENT_MODULE}",
                (gpu, "a GPU"),
                (apex, f"apex with its CUDA extensions ({WEIGHT_GRADIENT_MODULE})"),
            ),
            fusion(
                "bias_activation_fusion",
                "bias_swiglu_fusion",
                "compiled SwiGLU",
                compiled,
                (swiglu, "SwiGLU: Megatron-Core has no fused form of this model's activation"),
            ),
            fusion("bias_dropout_fusion", "bias_dropout_fusion", "compiled residual addition", compiled),
            Fusion("moe_grouped_gemm", engine, f"TransformerEngine {'gives' if engine else 'would give'} it"),
            _attention(engine, find),
            fused_adam(find),
            Fusion("cross_entropy_loss_fusion", False, "it rounds gradients to bfloat16"),
        ),
    )


def _attention(engine: bool, find: Finder) -> Fusion:
    """TransformerEngine takes flash-attn where it is there, else cuDNN's; PyTorch chooses by itself."""
    if not engine:
        return Fusion("flash_attention", False, "PyTorch's scaled_dot_product_attention, by segments")
    packages = [name for name in ("flash_attn_3", "flash_attn") if find(name) is not None]
    given = f"{packages[0]} or cuDNN, as TransformerEngine chooses" if packages else "cuDNN's; flash-attn is not there"
    return Fusion("flash_attention", True, given)


def fused_adam(find: Finder = find_spec) -> Fusion:
    """Whose AdamW steps on the device, as megatron/core/optimizer/__init__.py imports it: the first of three."""
    for package, name in (("transformer_engine", "TransformerEngine's"), ("apex", "apex's")):
        if find(package) is not None:
            return Fusion("fused_adam", True, f"{name} FusedAdam")
    return Fusion("fused_adam", False, "PyTorch's AdamW: neither TransformerEngine nor apex is installed")
