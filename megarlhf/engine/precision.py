"""Which of an engine's passes compute in FP8, what guards them, and what happens past the guard.

On GPUs TransformerEngine's recipes compute, which Megatron-Core switches by `TransformerConfig.fp8`; on a CPU
models/fp8.py rounds. A pass that is not finite or past a limit is taken again in the weights' own type, in which
its phase stays for some steps or for good; nothing of the first try remains. All ranks of a role decide alike.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megarlhf.config.precision import ENGINE_PHASES, EnginePhase, PrecisionArguments, wide_dtype
from megarlhf.data.types import Floats
from megarlhf.engine.objective import NonFiniteError
from megarlhf.models.fp8 import Fp8Layers
from megarlhf.parallel.device import current_device, device_kind

_Result = TypeVar("_Result")
FOR_GOOD = -1


class PrecisionError(NonFiniteError):
    """A pass in FP8 past one of its limits, on every rank."""


@dataclass
class PhaseState:
    """One phase that is meant to compute in FP8."""

    steps_left: int = 0  # outside FP8; FOR_GOOD: all
    fallbacks: int = 0  # so far
    amax: float = 0.0  # largest of this step
    saturated: float = 0.0  # largest share of a pass of this step


class Precision:
    """The phases of one engine, and what of them is saved.

    Args:
        config: of the chunks; on GPUs its `fp8` follows the phase.
        chunks: of the model, after their weights have their dtype.
    """

    def __init__(self, options: PrecisionArguments, config: TransformerConfig, chunks: Sequence[Any]) -> None:
        self._options, self._config = options, config
        self._phases = {phase: PhaseState() for phase in ENGINE_PHASES if options.uses_fp8(phase)}
        on_cpu = bool(self._phases) and device_kind() == "cpu"
        self._layers = Fp8Layers(chunks, options) if on_cpu else None
        self._has_scales = options.fp8_recipe != "delayed"  # delayed ones are 1 before the first training pass
        self._said: list[str] = []
        self._switch(None)

    def in_fp8(self, phase: EnginePhase) -> bool:
        """Whether the phase's next pass computes in FP8; without gradients delayed scaling waits for scales."""
        state = self._phases.get(phase)
        return state is not None and state.steps_left == 0 and (phase == "train" or self._has_scales)

    @property
    def token_multiple(self) -> int:
        """What FP8's kernels need the number of a rank's tokens to be a multiple of (fp8_utils.get_fp8_align_size)."""
        return 16 if self._phases else 1

    def identity(self) -> list[str]:
        """What numbers of passes without gradients depend on."""
        return [f"fp8={self._options.recipe()}"] if self.in_fp8("log_prob") else []

    def guarded(self, phase: EnginePhase, compute: Callable[[], _Result]) -> _Result:
        """Run a pass, again outside of FP8 where the guard is not content with it.

        Args:
            compute: the pass, which calls `check` where a second try would still find everything as it was.
        Raises:
            NonFiniteError: a pass outside of FP8 raises it.
        """
        if self.in_fp8(phase):
            try:
                with self._fp8(phase):
                    return compute()
            except NonFiniteError as error:
                self.fall_back(phase, str(error))
        return compute()

    def check(self, phase: EnginePhase, values: Floats | None = None) -> None:
        """Judge what the pass has rounded so far, and what it gives; all ranks call it. Outside of FP8: nothing.

        Args:
            values: that must not be NaN; None where this rank has none.
        Raises:
            PrecisionError: one is not, or a limit is passed.
        """
        if not self.in_fp8(phase):
            return
        bad = 0 if values is None else int(np.isnan(values).sum())
        amax, nonfinite, saturated, total = 0.0, 0, 0, 0
        if self._layers is not None:
            seen = self._layers.take_statistics()
            amax, nonfinite, saturated, total = seen.amax, seen.nonfinite, seen.saturated, seen.total
        sums = torch.tensor([bad, nonfinite, saturated, total], dtype=torch.float64, device=current_device())
        most = torch.tensor(amax, dtype=torch.float64, device=current_device())
        dist.all_reduce(sums)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        bad, nonfinite, saturated, total = map(int, sums.tolist())
        share, state, options = saturated / max(1, total), self._phases[phase], self._options
        state.amax, state.saturated = max(state.amax, float(most)), max(state.saturated, share)
        limit = math.inf if options.fp8_max_amax is None else options.fp8_max_amax
        problems = {
            f"{bad} of its results are NaN": bad,
            f"{nonfinite} of its tensors are not finite": nonfinite,
            f"a number of {float(most):.3g} is above fp8_max_amax={limit:g}": float(most) > limit,
            f"{share:.2%} of its numbers are beyond FP8's largest, more than fp8_max_saturated="
            f"{options.fp8_max_saturated:g}": share > options.fp8_max_saturated,
        }
        if said := [sentence for sentence, is_so in problems.items() if is_so]:
            raise PrecisionError(", ".join(said))

    def fall_back(self, phase: EnginePhase, why: str) -> bool:
        """Leave FP8, for fp8_fallback_steps steps; False where the phase is outside of it. All ranks call it."""
        if not self.in_fp8(phase):
            return False
        state, steps = self._phases[phase], self._options.fp8_fallback_steps
        state.steps_left, state.fallbacks = steps or FOR_GOOD, state.fallbacks + 1
        if self._layers is not None:
            self._layers.settle()
        wide = wide_dtype(bf16=self._config.bf16)
        self._said.append(fallback_sentence(phase, why, wide=wide, steps=steps))
        return True

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Metrics of the step by phase and key, and sentences for the log; the next step begins."""
        found: dict[str, float] = {}
        for phase, state in self._phases.items():
            found |= {f"{phase}/fp8": float(self.in_fp8(phase)), f"{phase}/fallbacks": float(state.fallbacks)}
            if self._layers is not None:  # TransformerEngine does not tell
                found |= {f"{phase}/amax": state.amax, f"{phase}/saturated_frac": state.saturated}
            state.amax = state.saturated = 0.0
            if state.steps_left > 0:
                state.steps_left -= 1
                if state.steps_left == 0:
                    self._said.append(f"{phase} computes in fp8 again, fp8_fallback_steps are over")
        said, self._said = self._said, []
        return found, said

    def state(self) -> dict[str, Any]:
        """For a checkpoint, the same on all ranks, all of which call it. On GPUs the layers save their own scales."""
        return {
            "recipe": self._options.fp8_recipe,
            "phases": {phase: asdict(state) for phase, state in self._phases.items()},
            "has_scales": self._has_scales,
            "layers": {} if self._layers is None else self._layers.state(),
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from `state`; a phase that was not in FP8 then, and the scales of another recipe, begin anew."""
        if state is None:
            return
        for phase, saved in state["phases"].items():
            if phase in self._phases:
                self._phases[phase] = PhaseState(**saved)
        if state["recipe"] == self._options.fp8_recipe:
            self._has_scales = state["has_scales"]
            if self._layers is not None and state["layers"]:
                self._layers.load_state(state["layers"])

    def keep_fp8_weights(self) -> None:
        """With fp8_param_gather: the weights of FP8 layers as FP8 holds them, on every rank; after each step."""
        if self._options.fp8_param_gather and self._layers is not None:
            self._layers.round_weights()

    @contextmanager
    def _fp8(self, phase: EnginePhase) -> Iterator[None]:
        self._switch(phase)
        try:
            yield
            self._has_scales |= phase == "train"
        finally:
            self._switch(None)

    def _switch(self, phase: EnginePhase | None) -> None:
        """Into a phase's pass in FP8, or out of it."""
        if self._layers is not None:
            self._layers.on, self._layers.trains = phase is not None, phase == "train"
        elif self._phases:
            self._config.fp8 = None if phase is None else self._options.fp8_format


def fallback_sentence(phase: str, why: str, *, wide: str, steps: int) -> str:
    """What the log says."""
    until = f"for {steps} steps" if steps else "for the rest of the run"
    return f"{phase} leaves fp8 for {wide} {until} (fp8_fallback_steps={steps}): {why}"
