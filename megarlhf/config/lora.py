"""Options of low-rank adapters, for every program that trains."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoraArguments:
    """Train low-rank adapters beside frozen weights (LoRA, arXiv:2106.09685)."""

    lora_rank: int = 0
    """Rank of the adapters. 0: all weights are trained."""
    lora_alpha: int = 16
    """What an adapter adds is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Probability that an adapter's input is dropped in training."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Last names of the Hugging Face modules that get adapters, such as q_proj v_proj. all-linear: every matrix of
    attention and feed-forward parts, experts' included."""
    load_in_4bit: bool = False
    """Keep the frozen matrices of attention and feed-forward parts in 4 bits (QLoRA's NF4, by bitsandbytes). Needs
    lora_rank, and transformer_impl=local."""
