"""What each phase computes in: an entry for every option of config/precision.py."""

from typing import Any

from tests.config.option_probes import Options, Probe, Seen, both, metric, steps_with, transformer

FP8: Options = {"train_dtype": "fp8"}
DELAYED = FP8 | {"fp8_recipe": "delayed"}


def precision_probes(role: str) -> dict[str, Probe]:
    """Of the phases of Megatron's passes, as the engine `role` computes them."""

    def layers(*names: str) -> Seen:
        """Options as the layers that round got them."""

        def look(trace: Any) -> Any:
            options = trace.engine(role).precision._layers.options
            found = tuple(getattr(options, name) for name in names)
            return found if len(found) > 1 else found[0]

        return look

    def fallbacks(step: int) -> Seen:
        return metric("precision/train/fallbacks", step)

    ends = FP8 | {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 0}
    return {
        "train_dtype": Probe(
            value="fp8",
            seen=both(metric("precision/train/fp8", 1), metric("precision/train/amax", 1)),
            expected=(1.0, 8.0),
        ),
        "log_prob_dtype": Probe(
            value="fp8", seen=lambda t: bool(steps_with("precision/log_prob/fp8")(t)), expected=True
        ),
        "fp8_format": Probe(value="e4m3", seen=layers("fp8_format"), also=FP8),
        "fp8_recipe": Probe(value="tensorwise", seen=layers("fp8_recipe"), also=FP8),
        "fp8_param_gather": Probe(
            value=True,
            seen=lambda t: t.engine(role).precision._layers.num_rounded > 1,
            expected=True,
            also=FP8 | {"bf16": True},
        ),
        "fp8_amax_history_len": Probe(
            value=7, seen=layers("fp8_amax_history_len"), also=DELAYED | {"fp8_amax_compute_algo": "max"}
        ),
        "fp8_amax_compute_algo": Probe(value="max", seen=layers("fp8_amax_compute_algo"), also=DELAYED),
        "first_last_layers_bf16": Probe(
            value=True,
            seen=both(transformer("first_last_layers_bf16", role), layers("first_last_layers_bf16")),
            expected=(True, True),
            also=FP8,
        ),
        "num_layers_at_start_in_bf16": Probe(
            value=1, seen=transformer("num_layers_at_start_in_bf16", role), also=ends
        ),
        "num_layers_at_end_in_bf16": Probe(value=1, seen=transformer("num_layers_at_end_in_bf16", role), also=ends),
        "fp8_fallback_steps": Probe(value=1, seen=fallbacks(2), expected=2.0, also=FP8 | {"fp8_max_amax": 5.0}),
        "fp8_max_saturated": Probe(value=0.001, seen=fallbacks(1), expected=1.0, also=DELAYED),
        "fp8_max_amax": Probe(value=7.5, seen=fallbacks(1), expected=1.0, also=FP8),
    }


ROLLOUT = {
    "rollout_dtype": Probe(
        value="fp8",
        seen=lambda trace: trace.llms[0].options["additional_config"],
        expected={"megarlhf_rounds_weights": "fp8_per_block"},
    )
}
