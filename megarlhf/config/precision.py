"""What each phase of a run computes in: bf16 or fp32, as the weights are, or FP8 inside the decoder's linear layers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

Dtype = Literal["bf16", "fp8", "fp32"]
EnginePhase = Literal["log_prob", "train"]  # of Megatron's passes: without gradients, and in training
ENGINE_PHASES: tuple[EnginePhase, ...] = ("log_prob", "train")


@dataclass(frozen=True, kw_only=True)
class PrecisionArguments:
    """What each phase computes in (docs/precision.md). FP8's options are Megatron-LM's."""

    train_dtype: Dtype | None = None
    """Linear layers in training: fp8, or the type that bf16 gives the weights. None: that type."""
    log_prob_dtype: Dtype | None = None
    """Linear layers in passes without gradients: log-probs, the reference's too, values, evaluation losses. None: the
    type that bf16 gives the weights."""
    fp8_format: Literal["e4m3", "hybrid"] = "hybrid"
    """FP8's type of gradients: e4m3, as of all else, or hybrid, which is e5m2."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = "blockwise"
    """Where scales come from: a tensor's own largest number (tensorwise), those of earlier micro-batches (delayed), or
    the largest of 128x128 of a weight and of 128 numbers of a token (blockwise)."""
    fp8_param_gather: bool = False
    """Keep the weights of FP8 layers as FP8 holds them, and gather those; main weights stay fp32."""
    fp8_amax_history_len: int = 1
    """Micro-batches whose largest numbers delayed scaling remembers."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Which of them delayed scaling takes: the latest, or the largest."""
    first_last_layers_bf16: bool = False
    """Leave the first and the last layers out of FP8."""
    num_layers_at_start_in_bf16: int = 1
    """First layers that are left out, with first_last_layers_bf16."""
    num_layers_at_end_in_bf16: int = 1
    """Last layers that are left out, with first_last_layers_bf16."""
    fp8_fallback_steps: int = 0
    """Steps for which a phase leaves FP8 after a pass that is not finite, or past one of the limits. 0: for good."""
    fp8_max_saturated: float = 0.01
    """Largest share of a pass's numbers that may lie beyond FP8's largest (delayed scaling)."""
    fp8_max_amax: float | None = None
    """Largest |number| that a pass may give to FP8. None: any finite one."""

    def uses_fp8(self, phase: EnginePhase) -> bool:
        """Whether the phase is meant to compute in FP8."""
        return self.dtype(phase) == "fp8"

    def dtype(self, phase: EnginePhase) -> Dtype | None:
        """As it was asked for."""
        return self.train_dtype if phase == "train" else self.log_prob_dtype

    @property
    def any_fp8(self) -> bool:
        """Whether a pass of Megatron's computes in FP8."""
        return any(map(self.uses_fp8, ENGINE_PHASES))

    def recipe(self) -> str:
        """In a few words, for people."""
        said = f"{self.fp8_recipe}, {'e4m3 forward, e5m2 backward' if self.fp8_format == 'hybrid' else 'e4m3'}"
        if self.fp8_recipe == "delayed":
            said += f", {self.fp8_amax_compute_algo} of {self.fp8_amax_history_len} micro-batches"
        if self.first_last_layers_bf16:
            said += f", without the first {self.num_layers_at_start_in_bf16} and last {self.num_layers_at_end_in_bf16}"
            said += " layers"
        return said


@dataclass(frozen=True, kw_only=True)
class RLPrecisionArguments(PrecisionArguments):
    """What each phase computes in (docs/precision.md). FP8's options are Megatron-LM's."""

    rollout_dtype: Dtype | None = None
    """What vLLM computes in; with fp8 it rounds the weights of linear layers anew at each sync, in blocks with
    fp8_recipe=blockwise, else by tensor. None: the type that bf16 gives the weights."""

    def is_fp32(self, *, bf16: bool) -> bool:
        """Whether every phase computes in fp32, so that trainer and vLLM agree but for rounding."""
        return not bf16 and self.rollout_dtype in (None, "fp32") and not self.any_fp8


def precision_lines(precision: PrecisionArguments, *, bf16: bool, roles: Sequence[str]) -> list[str]:
    """For the plan: which phase runs where in what; nothing where all compute in the weights' type.

    Args:
        roles: that train, whose passes these are.
    """
    wide, engines = wide_dtype(bf16=bf16), getattr(precision, "rollout_dtype", None)
    where, until = " and ".join(roles), f"{precision.fp8_fallback_steps or 'all'} steps"
    lines = []
    if engines not in (None, wide):
        by = "block" if precision.fp8_recipe == "blockwise" else "tensor"
        made = f": weights of linear layers by {by}, made anew at each sync; past its guard {wide} for {until}"
        lines.append(f"rollout: {engines} in vLLM{made if engines == 'fp8' else ''}")
    for phase in ENGINE_PHASES:
        if precision.uses_fp8(phase):
            lines.append(f"{phase}: fp8 ({precision.recipe()}) in {where}; past its guard {wide} for {until}")
    if lines:
        said = ("rollout", *ENGINE_PHASES) if isinstance(precision, RLPrecisionArguments) else ENGINE_PHASES
        others = [phase for phase in said if not any(line.startswith(phase) for line in lines)]
        lines.append(f"{', '.join([*others, 'and all else'])}: {wide}")
    return lines


def wide_dtype(*, bf16: bool) -> Dtype:
    """The type of weights, and of a phase that has left FP8."""
    return "bf16" if bf16 else "fp32"


def given_options(precision: PrecisionArguments) -> dict[str, object]:
    """Options that are not as they are by default."""
    values = {field.name: (getattr(precision, field.name), field.default) for field in fields(precision)}
    return {name: value for name, (value, default) in values.items() if value != default}
