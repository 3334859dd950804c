"""A checkpoint and a PEFT LoRA adapter made into one checkpoint: W + alpha / r * B A, computed in float32."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megarlhf.formats.huggingface import read_checkpoint, shortened
from megarlhf.formats.json_files import read_json_object
from megarlhf.formats.safetensors_file import TensorFiles, TensorSpec, create_tensor_file
from megarlhf.formats.staging import replace_directory, staging_path
from megarlhf.models.companions import exported_config, write_companions, write_json
from megarlhf.models.names import check_names, main_dtype, model_shapes, stored_dtypes
from megarlhf.models.registry import find_architecture
from megarlhf.models.targets import module_of

_PLAIN: dict[str, tuple[Any, ...]] = {  # what of an adapter is understood: the values that change nothing
    "peft_type": ("LORA",),
    "bias": ("none", None),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "trainable_token_indices"), ({}, None)),
}


def read_adapter(directory: Path) -> tuple[dict[str, Tensor], float]:
    """An adapter's tensors by their names in the model, and what their products are multiplied by.

    Raises:
        ValueError: no adapter, one that is not whole, or one of another kind than plain LoRA.
    """
    source = f"lora_path={directory}"
    config = read_json_object(directory / "adapter_config.json", source)
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise ValueError(f"{source}; its {name}={config[name]} is not plain LoRA: merge it with PEFT")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"{source}; adapter_config.json has r={rank} and lora_alpha={alpha}: repair it")
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{source}; adapter_model.safetensors is missing (only safetensors are read)")
    with safe_open(str(file), framework="pt") as opened:
        tensors = {name.removeprefix("base_model.model."): opened.get_tensor(name) for name in opened.keys()}
    halves = {
        f"{name.rsplit('.lora_', 1)[0]}.lora_{half}.weight" for name in tensors if ".lora_" in name for half in "AB"
    }
    if missing := sorted(halves - tensors.keys()):
        raise ValueError(f"{source}; adapter_model.safetensors lacks {shortened(missing)}: repair it")
    return tensors, alpha / rank


def merge_lora(
    model: Path, lora: Path, output: Path, *, is_reward_model: bool, bf16: bool, dry_run: bool = False
) -> int:
    """Write the merged checkpoint to `output`, beside the adapter's tokenizer; returns the bytes of its weights.

    Args:
        is_reward_model: the model is of one score a sequence, whose head the adapter brings where the model has none.
        bf16: store bfloat16; otherwise the dtypes of the model.
        dry_run: make every check and stop.
    Raises:
        ValueError: the two do not fit, or the output is there already.
    """
    if output.exists():
        raise ValueError(f"output_path={output}; it exists already: give another directory")
    (hf, source), (adapter, scaling) = read_checkpoint(model, option="model_path"), read_adapter(lora)
    arch, head = find_architecture(hf), "value" if is_reward_model else "lm"
    check_names(arch, hf, source, head)
    shapes, dtypes = model_shapes(arch, hf, head), stored_dtypes(arch, hf, source, head)
    if bf16:
        dtypes = dict.fromkeys(dtypes, torch.bfloat16)
    modules = {module_of(name) for name in shapes}
    unknown = sorted(name for name in adapter if name not in shapes and name.rsplit(".lora_", 1)[0] not in modules)
    if unknown:
        raise ValueError(f"lora_path={lora}; {model} has no modules for {shortened(unknown)}: is it of another model?")
    if not {"score.weight"} & shapes.keys() <= {*adapter, *source.names()}:
        raise ValueError(f"is_rm=True; neither {model} nor {lora} has a score.weight: leave is_rm out")
    num_bytes = sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
    if dry_run:
        return num_bytes
    staging = staging_path(output)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    specs = sorted((TensorSpec(n, s, dtypes[n]) for n, s in shapes.items()), key=lambda s: -s.dtype.itemsize)
    weights_file = staging / "model.safetensors"
    create_tensor_file(weights_file, specs)
    with TensorFiles([weights_file], writable=True) as file:
        for name, shape in shapes.items():
            whole = adapter[name] if name in adapter else source.read(name, (slice(None),) * len(shape))
            if (a := adapter.get(f"{module_of(name)}.lora_A.weight")) is not None:
                b = adapter[f"{module_of(name)}.lora_B.weight"]
                whole = whole.float() + scaling * (b.float() @ a.float())
            file.write(name, whole)
        file.sync()
    weights_file.chmod(0o644)
    config = exported_config(model, hf, arch.class_with_head(head), main_dtype(shapes, dtypes))
    write_json(staging / "config.json", config)
    tokenizer = lora if (lora / "tokenizer_config.json").is_file() else None
    write_companions(staging, model, tokenizer=tokenizer, chat_template=None)
    replace_directory(staging, output)
    return num_bytes
