"""Which Hugging Face modules low-rank adapters may stand beside, and how large these are; from tables alone."""

from collections.abc import Sequence
from importlib.util import find_spec

from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import ArchSpec, Split, WeightMap
from megarlhf.models.names import model_maps

BLOCK = 64  # numbers of a row that are quantised together
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


def check_model_targets(lora: LoraArguments, arch: ArchSpec, hf: HFConfig, *, grouped_experts: bool) -> None:
    """Raises ValueError where a model has not the modules that are to have adapters, or computes them together."""
    if not lora.lora_rank:
        return
    maps = model_maps(arch, hf, "lm")
    targets = check_targets(lora.target_modules, maps)
    names = {last_name(module) for weight in maps if weight.expert for module in adaptable(weight)}
    if grouped_experts and (experts := sorted(names & targets)):
        raise ValueError(
            f"target_modules={' '.join(lora.target_modules)}; {', '.join(experts)} are experts', which "
            "transformer_impl=transformer_engine computes as one, without adapters between: name others in "
            "target_modules, or set transformer_impl=local"
        )


def is_quantised(weight: WeightMap) -> bool:
    """Whether load_in_4bit has a weight in 4 bits: a matrix that tensor parallelism cuts, but for the vocabulary's."""
    return weight.split is not Split.REPLICATED and bool(adaptable(weight))


def check_quantised(arch: ArchSpec, hf: HFConfig, layout: LayoutArguments) -> None:
    """Raises ValueError where a model's matrices cannot be kept in 4 bits in a layout, or bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit=True; bitsandbytes is not installed: install it, see requirements/")
    sizes, tp, unfit = arch.dimensions(hf), layout.tensor_model_parallel_size, dict[str, None]()
    for weight in filter(is_quantised, model_maps(arch, hf, "lm")):
        parts = (layout.expert_tensor_parallel_size or tp) if weight.expert else tp
        parts = parts if weight.split is Split.ROW else 1
        for module, (_, inputs) in adaptable(weight).items():
            if sizes[inputs] % (BLOCK * parts):
                unfit[f"{last_name(module)} has {sizes[inputs]} inputs on {parts} rank(s)"] = None
    if unfit:
        raise ValueError(
            f"load_in_4bit=True; {', '.join(unfit)} ({BLOCK} numbers of a row are quantised together, on one rank): "
            f"use fewer tensor-parallel ranks, or leave it out where the inputs are no multiple of {BLOCK}"
        )


def is_target(module: str, lora: LoraArguments) -> bool:
    """Whether an adaptable module is to have an adapter."""
    return "all-linear" in lora.target_modules or last_name(module) in lora.target_modules


def adapter_numbers(weight: WeightMap, lora: LoraArguments, sizes: dict[str, int], *, parts: int = 1) -> list[int]:
    """Numbers in each A and B matrix of a weight's adapters, on one rank of so many that cut it."""
    found = []
    for module, (outputs, inputs) in adaptable(weight).items():
        if is_target(module, lora):
            a = sizes[inputs] // (parts if weight.split is Split.ROW else 1)
            b = sizes[outputs] // (parts if weight.split not in (Split.ROW, Split.REPLICATED) else 1)
            found += [lora.lora_rank * a, lora.lora_rank * b]
    return found
