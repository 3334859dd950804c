"""Which Hugging Face modules low-rank adapters may stand beside, and how large these are; from tables alone."""

from collections.abc import Sequence

from megarlhf.config.lora import LoraArguments
from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import ArchSpec, Split, WeightMap
from megarlhf.models.names import model_maps

_ROUTERS = ("gate", "shared_expert_gate")  # matrices that are no linear layers in Megatron-Core


def module_of(hf_name: str) -> str:
    """A weight's module."""
    return hf_name.removesuffix(".weight")


def last_name(module: str) -> str:
    """What target_modules calls a module."""
    return module.rsplit(".", 1)[-1]


def adaptable(weight: WeightMap) -> dict[str, tuple[str, str]]:
    """The modules in a Megatron weight that may have adapters, with the names of their outputs' and inputs' sizes."""
    if weight.split is Split.VOCAB or weight.layer_number is None or weight.buffer:
        return {}
    found = {}
    for name, shape in zip(weight.hf, weight.shapes, strict=True):
        if len(shape) == 2 and name.endswith(".weight") and last_name(module_of(name)) not in _ROUTERS:
            found[module_of(name)] = (shape[0], shape[1])
    return found


def check_targets(targets: Sequence[str], maps: Sequence[WeightMap]) -> set[str]:
    """Last names of the modules that are meant.

    Raises:
        ValueError: a name that no module has.
    """
    known = {last_name(module) for weight in maps for module in adaptable(weight)}
    unknown = sorted(set(targets) - known - {"all-linear"})
    if unknown or not targets:
        raise ValueError(
            f"target_modules={' '.join(unknown)}; this model has no such matrices (adapters stand beside those of "
            f"attention and feed-forward parts): all-linear, or some of {' '.join(sorted(known))}"
        )
    return known if "all-linear" in targets else set(targets)


def check_model_targets(lora: LoraArguments, arch: ArchSpec, hf: HFConfig) -> None:
    """Raises ValueError where a model has not the modules that are to have adapters."""
    if lora.lora_rank:
        check_targets(lora.target_modules, model_maps(arch, hf, "lm"))


def adapter_numbers(weight: WeightMap, lora: LoraArguments, sizes: dict[str, int], *, parts: int = 1) -> int:
    """Numbers of a weight's adapters on one rank of so many that cut it."""
    total = 0
    for module, (outputs, inputs) in adaptable(weight).items():
        if "all-linear" in lora.target_modules or last_name(module) in lora.target_modules:
            a = sizes[inputs] // (parts if weight.split is Split.ROW else 1)
            b = sizes[outputs] // (parts if weight.split not in (Split.ROW, Split.REPLICATED) else 1)
            total += lora.lora_rank * (a + b)
    return total
