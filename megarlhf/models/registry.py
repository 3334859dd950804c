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


def check_transformer_engine(
    arch: ArchSpec, config: HFConfig, *, context_parallel_size: int, cp_comm_type: str
) -> None:
    """For GPUs, which compute with TransformerEngine's attention.

    Raises:
        ValueError: what that attention cannot do.
    """
    errors = []
    cap, window = arch.additions(config).attention_soft_cap, arch.derived_config(config).get("window_size")
    if cap is not None:
        errors.append(f"attn_logit_softcapping={cap}: TransformerEngine's attention has no soft cap, so not on GPUs")
    if window and context_parallel_size > 1 and cp_comm_type == "p2p":
        errors.append(
            f"cp_comm_type=p2p: TransformerEngine's ring has no sliding window, of which layers see {window[0] + 1} "
            "tokens: use all_gather"
        )
    if errors:
        raise ValueError(f"architecture {arch.hf_class}: " + "; ".join(errors))
