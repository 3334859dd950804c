"""The trained model as a Hugging Face checkpoint: what --save leaves in hf/."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarlhf.engine.engine import MegatronEngine
from megarlhf.formats.safetensors_file import TensorFiles, TensorSpec, create_tensor_file
from megarlhf.formats.staging import replace_directory, staging_path, sync
from megarlhf.models.companions import exported_config, write_companions, write_json
from megarlhf.models.lora import Adapters
from megarlhf.models.names import main_dtype
from megarlhf.parallel.device import release_memory
from megarlhf.parallel.groups import all_gather_objects


def export_hf(
    engine: MegatronEngine,
    directory: Path,
    *,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    config_entries: Mapping[str, float] | None = None,
) -> None:
    """Write config, tokenizer and model.safetensors in the source's dtypes; every rank writes its own part in place.

    Goes to `<directory>.partial` first and is renamed when whole; an earlier export there is replaced. With LoRA it is
    a PEFT adapter beside the tokenizer: adapter_config.json and adapter_model.safetensors.

    Args:
        tokenizer: directory of the tokenizer that the model was trained with; None for its pretrain.
        chat_template: text that replaced the tokenizer's chat template in training; None where its own was used.
        config_entries: what config.json has besides; beside an adapter, which has none, config_entries.json.
    """
    staging = staging_path(directory)
    adapters, ranks = engine.adapters, engine.ranks
    weights_file = staging / ("model.safetensors" if adapters is None else "adapter_model.safetensors")
    specs = engine.weights.tensor_specs(engine.source_dtypes) if adapters is None else _adapter_specs(adapters)
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        create_tensor_file(weights_file, specs)
    dist.barrier()
    engine.finish_param_gather()
    with TensorFiles([weights_file], specs=specs) as file:
        if adapters is None:
            engine.weights.write(file)
        else:
            for tensor in adapters.tensors():
                if not any(tensor.replica(ranks)):
                    file.write(tensor.name, tensor.parameter, tensor.index(ranks))
        file.sync()
    dist.barrier()
    if dist.get_rank() == 0:  # the others' parts are on the disk
        weights_file.chmod(0o644)
        if adapters is None:
            hf_class = engine.weights.arch.class_with_head(engine.head)
            dtype = main_dtype(engine.weights.hf_shapes, engine.source_dtypes)
            content = exported_config(engine.pretrain, engine.hf, hf_class, dtype) | dict(config_entries or {})
            write_json(staging / "config.json", content)
        else:
            write_json(staging / "adapter_config.json", _adapter_config(engine, adapters))
            if config_entries:
                write_json(staging / "config_entries.json", dict(config_entries))
        tokenizer_dir = None if tokenizer is None else Path(tokenizer)
        write_companions(staging, engine.pretrain, tokenizer=tokenizer_dir, chat_template=chat_template)
        sync(*staging.rglob("*"), staging)
        replace_directory(staging, directory)
        sync(directory.parent)
    dist.barrier()
    release_memory()


def _adapter_specs(adapters: Adapters) -> list[TensorSpec]:
    """Layout of the whole adapter's file, in float32 as PEFT keeps adapters; all ranks call it."""
    parts = all_gather_objects({tensor.name: tensor.shape for tensor in adapters.tensors()})
    shapes = {name: shape for part in parts for name, shape in part.items()}
    return [TensorSpec(name, shapes[name], torch.float32) for name in sorted(shapes)]


def _adapter_config(engine: MegatronEngine, adapters: Adapters) -> dict[str, Any]:
    """adapter_config.json, as PEFT's LoraConfig reads it."""
    value, options = engine.head == "value", adapters.options
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if value else "CAUSAL_LM",
        "base_model_name_or_path": str(engine.pretrain),
        "r": options.lora_rank,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": adapters.target_names(),
        "modules_to_save": ["score"] if value else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
