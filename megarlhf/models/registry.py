"""The supported architectures, by their Hugging Face class."""

from collections.abc import Callable
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megarlhf.formats.huggingface import LM_HEAD, HFConfig, HFWeights
from megarlhf.formats.json_files import one_line
from megarlhf.models.arch import ArchSpec
from megarlhf.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megarlhf.models.families import LLAMA, MISTRAL, QWEN2, QWEN3
from megarlhf.models.gemma import GEMMA2, GEMMA3
from megarlhf.models.mixtures import MIXTRAL, QWEN2_MOE, QWEN3_MOE

_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3)
ARCHITECTURES = {arch.hf_class: arch for arch in _ALL}
_REWARD_CLASSES = {arch.class_with_head("value"): arch for arch in ARCHITECTURES.values()}


def find_architecture(config: HFConfig) -> ArchSpec:
    """The table for a configuration: enough to read, convert and write weights.

    Raises:
        ValueError: an architecture without a table (the supported ones are listed), another one than Transformers takes
            for the same configuration, or weights that the table lacks.
    """
    name = (config.architectures or ["none"])[0]
    arch = ARCHITECTURES.get(name) or _REWARD_CLASSES.get(name)
    if arch is None:
        raise ValueError(f"config.json: architecture {name} has no table; supported: {', '.join(ARCHITECTURES)}")
    taken = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    errors = []
    if taken != arch.hf_class:
        errors.append(f"model_type={config.model_type}, of which Transformers makes {taken}: one of the two is wrong")
    if getattr(config, "quantization_config", None) is not None:
        errors.append("quantization_config is set; store the weights as bfloat16 and remove it")
    _refuse(errors, arch, config, _weight_errors)
    return arch


def check_computing(arch: ArchSpec, config: HFConfig) -> None:
    """What training asks of a configuration besides find_architecture, and converting and inspecting do not.

    Raises:
        ValueError: something that the model computes and Megatron-Core or the table cannot express.
    """
    _refuse([], arch, config, _computing_errors)


def _refuse(
    errors: list[str], arch: ArchSpec, config: HFConfig, judge: Callable[[ArchSpec, HFConfig], list[str]]
) -> None:
    """A table's functions see only the configuration, so an error in them is of its values."""
    try:
        errors = errors or judge(arch, config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        errors = [f"it has values that cannot be worked with ({one_line(error)})"]
    if errors:
        architecture = (config.architectures or ["none"])[0]
        raise ValueError(f"config.json: architecture {architecture}: " + "; ".join(errors))


def _weight_errors(arch: ArchSpec, config: HFConfig) -> list[str]:
    errors, sizes = arch.check_weights(config), arch.dimensions(config)
    wrong = [f"{name}={size!r}" for name, size in sizes.items() if type(size) is not int or size < 0]
    arch.moe_layers(config)
    return errors + ([f"it makes sizes of {', '.join(wrong)}"] if wrong else [])


def _computing_errors(arch: ArchSpec, config: HFConfig) -> list[str]:
    errors = _rope_errors(config.rope_parameters or {}) or arch.check(config)
    if not errors:
        arch.megatron_fields(config)
        arch.additions(config)
    return errors


def _rope_errors(rope: dict[str, Any]) -> list[str]:
    """Transformers merely warns of such values, and fails later or computes with something else."""
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    values = [(key, value) for part in parts for key, value in part.items() if not isinstance(value, dict | None)]
    texts, switches = ("rope_type", "type"), ("truncate",)
    wrong = [
        f"{key}={value!r}"
        for key, value in values
        if not isinstance(value, str if key in texts else bool if key in switches else int | float)
        or (isinstance(value, int | float) and not 0 <= value < float("inf"))
        or (key in ("rope_theta", "factor") and not value)
    ]
    errors = [f"rope_parameters has {', '.join(wrong)}: numbers above 0 and the name of a type"] if wrong else []
    shares = [value for key, value in values if key == "partial_rotary_factor" and value != 1]
    return errors + [f"partial_rotary_factor={share}; these models turn all of a head's channels" for share in shares]


def check_engine_head(arch: ArchSpec, config: HFConfig, source: HFWeights) -> None:
    """For generation: vLLM's models of some families have one kind of output layer only.

    Raises:
        ValueError: the checkpoint has the other kind.
    """
    stored, place = LM_HEAD in source.names(), f"{source.source}; {arch.hf_class}"
    if arch.engine_head == "embedding" and stored:
        cure = "remove it" if config.tie_word_embeddings else "this model cannot generate there"
        raise ValueError(f"{place} stores {LM_HEAD}; vLLM's model has no place for it, it takes the embedding: {cure}")
    if arch.engine_head == "own" and not stored:
        raise ValueError(f"{place} stores no {LM_HEAD}, which vLLM's model needs beside the embedding: store it")


def check_transformer_engine(arch: ArchSpec, config: HFConfig, *, context_parallel_size: int) -> None:
    """For TransformerEngine's attention.

    Its ring refuses windows (2.11, context_parallel.py:4026), and its all-gather, which takes them, no packed sequences
    (:2842).

    Raises:
        ValueError: what that attention cannot do.
    """
    errors = []
    cap, window = arch.additions(config).attention_soft_cap, arch.derived_config(config).get("window_size")
    if cap is not None:
        errors.append(f"attn_logit_softcapping={cap}: TransformerEngine's attention has no soft cap")
    if window and context_parallel_size > 1:
        errors.append(
            f"context_parallel_size={context_parallel_size}: TransformerEngine's has no sliding window over packed "
            f"sequences, and layers see {window[0] + 1} tokens: use 1"
        )
    if errors:
        raise ValueError(f"architecture {arch.hf_class}: {'; '.join(errors)}; or set transformer_impl=local")
