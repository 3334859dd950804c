"""The trained model as a Hugging Face checkpoint: what --save leaves in hf/."""

import json
import shutil
from pathlib import Path

import torch.distributed as dist

from megarlhf.data.tensor_file import TensorFile
from megarlhf.engine.engine import MegatronEngine
from megarlhf.models.hf_files import copy_companions
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
    engine.weights.write(file)
    file.flush()
    file.close()
    dist.barrier()
    if dist.get_rank() == 0:
        _write_config(engine, partial)
        copy_companions(engine.pretrain, partial)
        _replace(partial, directory)
    dist.barrier()
    release_memory()


def _write_config(engine: MegatronEngine, directory: Path) -> None:
    config = json.loads((engine.pretrain / "config.json").read_text())
    name = engine.weights.arch.hf_class
    if engine.head == "value":
        name = engine.weights.arch.sequence_classification_class
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config["architectures"] = [name]
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _replace(partial: Path, final: Path) -> None:
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)  # of an export that was interrupted here
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
