"""The supported architectures, by their Hugging Face class."""

from megarlhf.models.arch import ArchSpec
from megarlhf.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megarlhf.models.families import LLAMA, MISTRAL, QWEN2, QWEN3
from megarlhf.models.gemma import GEMMA2, GEMMA3
from megarlhf.models.hf_files import HFConfig
from megarlhf.models.mixtures import MIXTRAL, QWEN2_MOE, QWEN3_MOE

_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)
_MIXTURES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3)
ARCHITECTURES = {arch.hf_class: arch for arch in _DENSE + _MIXTURES}
_REWARD_CLASSES = {arch.sequence_classification_class: arch for arch in ARCHITECTURES.values()}


def find_architecture(config: HFConfig) -> ArchSpec:
    """The table for a configuration.

    Raises:
        ValueError: an architecture without a table (the supported ones are listed), or a feature the table lacks.
    """
    name = (config.architectures or ["none"])[0]
    arch = ARCHITECTURES.get(name) or _REWARD_CLASSES.get(name)
    if arch is None:
        raise ValueError(f"architecture {name} has no table; supported: {', '.join(ARCHITECTURES)}")
    errors = arch.check(config)
    if errors:
        raise ValueError(f"architecture {name}: " + "; ".join(errors))
    return arch
