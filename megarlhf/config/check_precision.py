"""What each phase is to compute in, against the rest of a configuration and against the devices.

Every function returns sentences and raises nothing. Read in Megatron-Core 0.16.1: transformer_config.py:990 (first and
last layers), fp8_utils.py:640 (delayed scaling with them); in TransformerEngine 2.11: fp8.py `check_fp8_support` (8.9)
and `check_fp8_block_scaling_support` (9.0); in vLLM 0.32: model_executor/layers/quantization/fp8.py:104 ("fp8" rounds
no weights any more, fp8_per_tensor and fp8_per_block do).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_layout import broken, size
from megarlhf.config.layouts import LayoutArguments, TransformerImpl
from megarlhf.config.precision import ENGINE_PHASES, PrecisionArguments, RLPrecisionArguments, given_options, wide_dtype
from megarlhf.config.roles import megatron_roles
from megarlhf.config.supervised_arguments import SupervisedConfig

_OF_DELAYED = ("fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_max_saturated")
_OF_ENDS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_OF_ANY = ("fp8_recipe", "fp8_fallback_steps")  # the rollout's too
_OF_ENGINE = ("fp8_format", "fp8_param_gather", "first_last_layers_bf16", "fp8_max_amax", *_OF_DELAYED, *_OF_ENDS)


def precision_errors(config: PPOConfig | SupervisedConfig, models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whatever the devices are.

    Args:
        models: config.json by the option that names the directory.
    """
    precision, bf16 = config.precision, config.model.bf16
    wide, given = wide_dtype(bf16=bf16), given_options(precision)
    rollout = precision.rollout_dtype if isinstance(precision, RLPrecisionArguments) else None
    recipe, errors = precision.fp8_recipe, list[str]()
    for phase in ENGINE_PHASES:
        asked = precision.dtype(phase)
        if asked not in (None, "fp8", wide):
            cure = "leave bf16 out" if bf16 else "set bf16"
            errors.append(
                f"{phase}_dtype={asked} with bf16={bf16} (weights are {wide}, and Megatron's passes compute in their "
                f"type or in fp8): {cure}, or leave {phase}_dtype out"
            )
    unused = {
        **dict.fromkeys(_OF_ENGINE, (not precision.any_fp8, "train_dtype=fp8 or log_prob_dtype=fp8")),
        **dict.fromkeys(_OF_ANY, (not precision.any_fp8 and rollout != "fp8", "a phase in fp8")),
    }
    for name in given.keys() & unused.keys():
        is_unused, needed = unused[name]
        if name in _OF_DELAYED and recipe != "delayed":
            is_unused, needed = True, "fp8_recipe=delayed"
        if name in _OF_ENDS and not precision.first_last_layers_bf16:
            is_unused, needed = True, "first_last_layers_bf16"
        if is_unused:
            errors.append(f"{name}={given[name]} is ignored without {needed}: set that, or leave {name} out")
    return errors + _recipe_errors(config, precision) + _ends_errors(config, models)


def _recipe_errors(config: PPOConfig | SupervisedConfig, precision: PrecisionArguments) -> list[str]:
    delayed, train = precision.fp8_recipe == "delayed", precision.uses_fp8("train")
    algorithm, length = precision.fp8_amax_compute_algo, precision.fp8_amax_history_len
    optimizer = config.layout.use_distributed_optimizer and config.model.bf16
    return broken(
        {
            "log_prob_dtype=fp8 with fp8_recipe=delayed and without train_dtype=fp8 (only training passes move delayed "
            "scales on): set train_dtype=fp8, or another fp8_recipe": (
                delayed and precision.uses_fp8("log_prob") and not train
            ),
            "first_last_layers_bf16=True with fp8_recipe=delayed (Megatron-Core moves delayed scales on once for all "
            "layers): set another fp8_recipe, or leave it out": delayed and precision.first_last_layers_bf16,
            f"fp8_amax_history_len={length} is ignored with fp8_amax_compute_algo=most_recent: set that to max, or "
            "leave it out": delayed and algorithm == "most_recent" and length != 1,
            "fp8_param_gather=True needs train_dtype=fp8, bf16 and use_distributed_optimizer (main weights in fp32 "
            "stand behind the FP8 ones): set them, or leave fp8_param_gather out": (
                precision.fp8_param_gather and precision.any_fp8 and not (train and optimizer)
            ),
            "load_in_4bit=True with fp8 (the frozen weights are in 4 bits already): leave one of them out": (
                precision.any_fp8 and config.lora.load_in_4bit
            ),
            "fp8_param_gather=True with lora_rank above 0 (no optimizer steps the weights of FP8 layers): leave it "
            "out": precision.fp8_param_gather and config.lora.lora_rank,
        }
    )


def _ends_errors(config: PPOConfig | SupervisedConfig, models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """First and last layers in bf16 against the layers that each model and stage has."""
    precision, errors = config.precision, list[str]()
    if not precision.first_last_layers_bf16:
        return []
    ends = (precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16)
    shown = f"num_layers_at_start_in_bf16={ends[0]} and num_layers_at_end_in_bf16={ends[1]}"
    trained: list[tuple[str, LayoutArguments]] = [("pretrain", config.layout)]
    if isinstance(config, PPOConfig):
        trained = [(role.start(config)[0], role.layout(config)) for role in megatron_roles(config) if role.trains]
    for owner, layout in trained:
        layers = size(models.get(owner, {}), "num_hidden_layers")
        if layers is None or layout.pipeline_model_parallel_size < 1:
            continue
        stage = layers // layout.pipeline_model_parallel_size
        if max(ends) > stage or sum(ends) >= layers:
            errors.append(
                f"{shown} of num_hidden_layers={layers} of {owner} (at most a stage's {stage} at either end, and a "
                "layer must be left for FP8): use fewer"
            )
    return list(dict.fromkeys(errors))


def precision_device_errors(
    precision: PrecisionArguments,
    impl: TransformerImpl,
    *,
    bf16: bool,
    on_gpu: bool,
    capability: tuple[int, int] | None,
    recompute_modules: Sequence[str] | None = None,
) -> list[str]:
    """FP8 on devices that do not have it.

    Args:
        capability: CUDA's, of the GPUs; None where it is not known, as on a node without any.
    """
    asked = [f"{phase}_dtype=fp8" for phase in ENGINE_PHASES if precision.uses_fp8(phase)]
    if getattr(precision, "rollout_dtype", None) == "fp8":
        asked.append("rollout_dtype=fp8")
    if not asked or not on_gpu:
        return []
    shown, least = " and ".join(asked), (9, 0) if precision.fp8_recipe == "blockwise" else (8, 9)
    found, needed = (f"{number[0]}.{number[1]}" for number in (capability or least, least))
    small = capability is not None and capability < least
    too_old = small and capability is not None and capability < (8, 9)
    cure = "set bf16 for these phases (leave the options out)" if too_old else "set fp8_recipe=tensorwise"
    return broken(
        {
            f"{shown} on GPUs of compute capability {found} (fp8_recipe={precision.fp8_recipe} needs {needed}; an A100 "
            f"has 8.0, an L40S 8.9, an H100 9.0): {cure}": small,
            f"{shown} with bf16=False (FP8's kernels take and give bfloat16): set bf16": not bf16,
            f"{shown} with transformer_impl=local (on GPUs FP8 is TransformerEngine's): leave transformer_impl out": (
                precision.any_fp8 and impl == "local"
            ),
            "fp8_param_gather=True on GPUs (sync, reference, sleep and export read weights as plain tensors, which "
            "TransformerEngine's FP8 ones are not): leave it out": precision.fp8_param_gather,
            f"recompute_modules={' '.join(recompute_modules or ())} with fp8_recipe=delayed (Megatron-Core: no delayed "
            "scaling with recomputed moe_act and layernorm): leave these out, or set another fp8_recipe": (
                precision.any_fp8
                and precision.fp8_recipe == "delayed"
                and not {"moe_act", "layernorm"}.isdisjoint(recompute_modules or ())
            ),
        }
    )


def check_node(
    precision: RLPrecisionArguments, phases: Collection[str], *, on_gpu: bool, capability: tuple[int, int] | None
) -> None:
    """In a worker's process, whose node the start of the run may not have seen.

    Args:
        phases: "rollout", "log_prob" and "train": those that it computes.
    Raises:
        RuntimeError: its GPU cannot compute what is asked.
    """
    others: dict[str, Any] = {f"{phase}_dtype": None for phase in ("rollout", *ENGINE_PHASES) if phase not in phases}
    precision = replace(precision, **others)
    errors = precision_device_errors(precision, "transformer_engine", bf16=True, on_gpu=on_gpu, capability=capability)
    if errors:
        raise RuntimeError("; ".join(errors))
