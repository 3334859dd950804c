"""The trained model as a Hugging Face checkpoint: what --save leaves in hf/."""

import shutil
from pathlib import Path

import torch.distributed as dist

from megarlhf.engine.engine import MegatronEngine
from megarlhf.formats.safetensors_file import TensorFile
from megarlhf.formats.staging import replace_directory
from megarlhf.models.companions import exported_config, write_companions, write_json
from megarlhf.models.names import main_dtype
from megarlhf.parallel.device import release_memory


def export_hf(
    engine: MegatronEngine, directory: Path, *, tokenizer: str | None = None, chat_template: str | None = None
) -> None:
    """Write config, tokenizer and model.safetensors in the source's dtypes; every rank writes its own part in place.

    Goes to `<directory>.partial` first and is renamed when whole; an earlier export there is replaced.

    Args:
        tokenizer: directory of the tokenizer that the model was trained with; None for its pretrain.
        chat_template: text that replaced the tokenizer's chat template in training; None where its own was used.
    """
    staging = directory.with_name(directory.name + ".partial")
    weights_file = staging / "model.safetensors"
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        TensorFile.create(weights_file, engine.weights.tensor_specs(engine.source_dtypes)).close()
    dist.barrier()
    engine.finish_param_gather()
    with TensorFile(weights_file) as file:
        engine.weights.write(file)
        file.flush()
    weights_file.chmod(0o644)
    dist.barrier()
    if dist.get_rank() == 0:
        hf_class = engine.weights.arch.class_with_head(engine.head)
        dtype = main_dtype(engine.weights.hf_shapes, engine.source_dtypes)
        write_json(staging / "config.json", exported_config(engine.pretrain, engine.hf, hf_class, dtype))
        tokenizer_dir = None if tokenizer is None else Path(tokenizer)
        write_companions(staging, engine.pretrain, tokenizer=tokenizer_dir, chat_template=chat_template)
        replace_directory(staging, directory)
    dist.barrier()
    release_memory()
