"""The supported architectures, by their Hugging Face class."""

from megarlhf.models.arch import ArchSpec
from megarlhf.models.families import LLAMA, MISTRAL, QWEN2, QWEN3
from megarlhf.models.hf_files import HFConfig
from megarlhf.models.mixtures import MIXTRAL, QWEN2_MOE, QWEN3_MOE

ARCHITECTURES = {arch.hf_class: arch for arch in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE)}


def find_architecture(config: HFConfig) -> ArchSpec:
    """The table for a configuration.

    Raises:
        ValueError: an architecture without a table (the supported ones are listed), or a feature the table lacks.
    """
    name = (config.architectures or ["none"])[0]
    arch = ARCHITECTURES.get(name.replace("ForSequenceClassification", "ForCausalLM"))
    if arch is None:
        raise ValueError(f"architecture {name} has no table; supported: {', '.join(ARCHITECTURES)}")
    errors = arch.check(config)
    if errors:
        raise ValueError(f"architecture {name}: " + "; ".join(errors))
    return arch
