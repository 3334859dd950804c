"""The trained model as a Hugging Face checkpoint: what --save leaves in hf/."""

import json
from pathlib import Path

import torch.distributed as dist

from megarlhf.data.partial import replace_directory
from megarlhf.data.tensor_file import TensorFile
from megarlhf.engine.engine import MegatronEngine
from megarlhf.models.hf_files import copy_companions, exported_config
from megarlhf.parallel.device import release_memory


def export_hf(engine: MegatronEngine, directory: Path) -> None:
    """Write config, tokenizer and model.safetensors in the source's dtype; every rank writes its own part in place.

    Goes to `<directory>.partial` first and is renamed when whole; an earlier export there is replaced.
    """
    partial = directory.with_name(directory.name + ".partial")
    weights_file = partial / "model.safetensors"
    if dist.get_rank() == 0:
        partial.mkdir(parents=True, exist_ok=True)
        weights_file.unlink(missing_ok=True)
        specs = engine.weights.tensor_specs(engine.source_dtype)
        TensorFile.create(weights_file, specs, {"format": "pt"}).close()
    dist.barrier()
    file = TensorFile.open(weights_file, writable=True)
    engine.settle()
    engine.weights.write(file)
    file.flush()
    file.close()
    weights_file.chmod(0o644)
    dist.barrier()
    if dist.get_rank() == 0:
        config = exported_config(engine.pretrain, engine.weights.arch.class_with_head(engine.head))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(engine.pretrain, partial)
        replace_directory(partial, directory)
    dist.barrier()
    release_memory()
