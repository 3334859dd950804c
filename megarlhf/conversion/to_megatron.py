"""A Hugging Face checkpoint as Megatron-Core's, a few tensors at a time and bit for bit.

    SAVE/latest_checkpointed_iteration.txt     "release"
    SAVE/release/                              torch_dist: tensors of the whole model, cut for the target sizes
    SAVE/hf_config/                            config.json, tokenizer and the like, for the way back

Any layout loads the result; the target sizes decide into which chunks and files the tensors are cut.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from megarlhf.conversion import steps
from megarlhf.conversion.cuts import GlobalWeight, cut_model
from megarlhf.conversion.steps import ConvertOptions, Digests
from megarlhf.conversion.to_hf import hf_form, hf_tensors, reading_bytes
from megarlhf.formats.huggingface import EMBEDDING, HFConfig, has_score_head, read_checkpoint
from megarlhf.formats.megatron import HF_CONFIG, RELEASE
from megarlhf.formats.run_checkpoints import LATEST
from megarlhf.formats.safetensors_file import TensorFiles
from megarlhf.formats.staging import StagingDirectory
from megarlhf.formats.torch_dist import TorchDistReader, write_metadata, write_objects, write_tensor
from megarlhf.models.arch import Split
from megarlhf.models.build import Head
from megarlhf.models.companions import copy_companions, tied_config, write_json
from megarlhf.models.heads import drawn_value_weights
from megarlhf.models.names import check_names
from megarlhf.models.registry import find_architecture
from megarlhf.models.shards import shards_of

_SEED = 42  # of a critic's head that the source lacks, as in the programs' --seed


def hf_to_megatron(
    load: Path, save: Path, *, tensor: int, pipeline: int, expert: int, head: Head | None, options: ConvertOptions
) -> None:
    """Convert.

    Args:
        head: None for what the source has. "value" also starts a critic from a causal language model: its output layer
            is left out, its value head drawn.
    Raises:
        ValueError: a source, layout or target that cannot be converted; nothing has been written then, but for tensors
            with NaN, which are found on the way.
    """
    hf, source = read_checkpoint(load, option="load")
    arch = find_architecture(hf)
    kind: Head = head or ("value" if has_score_head(hf) else "lm")
    check_names(arch, hf, source, kind)
    model = cut_model(arch, hf, head=kind, tensor=tensor, pipeline=pipeline, expert=expert)
    paths = [load / name for name in source.files]
    work = _Conversion(hf=hf, files=TensorFiles(paths), options=options)
    steps.check_target(load, save, sum(map(work.num_bytes, model.weights)), overwrite=options.overwrite)
    if options.dry_run:
        return
    layout = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
    about = {"source": str(load), "architecture": arch.hf_class, "head": kind, "layout": layout}
    bundles = steps.bundles(model.weights, work.num_bytes)
    identity = {**about, "dtype": str(options.dtype), "files": steps.fingerprint(paths), "steps": list(bundles)}
    with StagingDirectory(save, identity) as staging:
        target = staging.path / RELEASE
        target.mkdir(exist_ok=True)
        memory = steps.Memory(max(work.num_bytes(weight) + work.copied_bytes(weight) for weight in model.weights))

        def write(name: str, bundle: list[GlobalWeight]) -> dict[str, Any]:
            return work.write(target / f"__{name}.distcp", memory, bundle)

        steps.run(bundles, write, work.num_bytes, phase="convert", staging=staging, options=options)
        # what tells Megatron-Core and Megatron-LM what the directory holds
        chunks = [chunk for record in staging.done.values() for chunk in record["chunks"]]
        tensors = {weight.key: (weight.tensor_shape, work.dtype(weight)) for weight in model.weights}
        write_metadata(target, tensors, chunks, write_objects(target, "__objects.distcp", model.objects))
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, target / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(target))
        manifest = {name: entry for record in staging.done.values() for name, entry in record["digests"].items()}
        steps.write_manifest(target, manifest, **about, left_out=sorted(set(source.names()) - manifest.keys()))
        companions = staging.path / HF_CONFIG
        companions.mkdir(exist_ok=True)
        write_json(companions / "config.json", tied_config(load, hf))
        copy_companions(load, companions)
        (staging.path / LATEST).write_text(RELEASE)
        if options.verify:
            reader = TorchDistReader(target, f"save={save}")
            memory = steps.Memory(max(reading_bytes(weight, reader) for weight in model.weights))

            def check(_: str, bundle: list[GlobalWeight]) -> None:
                for weight in bundle:
                    with memory.lend(0, besides=reading_bytes(weight, reader)):
                        steps.check_manifest(hf_tensors(weight, reader, hf), manifest, reader.source)

            steps.run(bundles, check, work.num_bytes, phase="verify", staging=None, options=options)


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    """What the steps share."""

    hf: HFConfig
    files: TensorFiles
    options: ConvertOptions

    def source_dtype(self, weight: GlobalWeight) -> torch.dtype:
        """The dtype of a weight's HF tensors; a drawn one has the embedding's."""
        names = [name for name in weight.weight.hf if name in self.files.places] or [EMBEDDING]
        found = {self.files.dtype(name) for name in names}
        if len(found) > 1 or not found <= set(steps.DTYPES.values()):
            kinds = sorted(str(dtype).removeprefix("torch.") for dtype in found)
            raise ValueError(f"tensors {names} have dtypes {kinds}; one of {', '.join(steps.DTYPES)} for all")
        return found.pop()

    def dtype(self, weight: GlobalWeight) -> torch.dtype:
        """The dtype of a weight in the target; what Megatron-Core keeps as buffers is not converted."""
        source = self.source_dtype(weight)
        return source if weight.weight.buffer or self.options.dtype is None else self.options.dtype

    def num_bytes(self, weight: GlobalWeight) -> int:
        """Bytes of a weight in the target."""
        return weight.num_elements * self.dtype(weight).itemsize

    def copied_bytes(self, weight: GlobalWeight) -> int:
        """Memory that a weight takes beside itself: HF tensors not read straight into it, then chunks cut out of it."""
        source, dtype = self.source_dtype(weight), self.dtype(weight)
        in_place = source == dtype and weight.weight.split is not Split.QKV
        hf = 0 if in_place else source.itemsize + (0 if source == dtype else dtype.itemsize)
        chunk = max(math.prod(chunk.shape) for chunk in weight.chunks) if len(weight.chunks) > 1 else 0
        return max(hf * weight.num_elements, chunk * dtype.itemsize)

    def write(self, path: Path, memory: steps.Memory, bundle: list[GlobalWeight]) -> dict[str, Any]:
        """One file of the target; its chunks' places and its HF tensors' entries in the manifest."""
        digests, chunks = Digests(), []
        with open(path, "wb") as file:
            for weight in bundle:
                with memory.lend(self.num_bytes(weight), besides=self.copied_bytes(weight)) as buffer:
                    places = self._write_chunks(file, weight, buffer, digests)
                    del buffer  # no name may keep memory that was given back
                chunks += [(weight.key, offset, shape, (path.name, *place)) for offset, shape, place in places]
            file.flush()
            os.fsync(file.fileno())
        return {"digests": digests, "chunks": chunks}

    def _write_chunks(
        self, file: BinaryIO, weight: GlobalWeight, buffer: Tensor, digests: Digests
    ) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]]:
        """Offset, shape and place in the file of each chunk of a parameter, which `buffer` holds meanwhile."""
        param = buffer.view(self.dtype(weight)).view(*weight.shape)
        self._fill(param, weight, digests)
        whole, origin, found = param.view(weight.region.shape), weight.region.offset, []
        for chunk in weight.chunks:
            starts = [place - first for place, first in zip(chunk.offset, origin, strict=True)]
            inside = tuple(slice(s, s + length) for s, length in zip(starts, chunk.shape, strict=True))
            found.append((chunk.offset, chunk.shape, write_tensor(file, whole[inside])))
        return found

    def _fill(self, param: Tensor, weight: GlobalWeight, digests: Digests) -> None:
        """Put together the whole Megatron parameter, and its HF tensors' entries in the manifest."""
        if weight.weight.split is Split.VOCAB:
            param[self.hf.vocab_size :] = 0
        for shard in shards_of(weight.weight, param, self.hf, tp_rank=0, tp_size=1):
            name, source = shard.hf_name, f"drawn with seed {_SEED}"
            if name not in self.files.places:
                tensor = drawn_value_weights(self.hf.hidden_size, _SEED).to(param.dtype)
            else:
                in_place = shard.view.is_contiguous() and self.files.dtype(name) == param.dtype
                tensor = hf_form(shard, param) if in_place else self.files.read(name)
                if in_place:
                    self.files.read_into(name, tensor)
                tensor = steps.converted(name, tensor, param.dtype, allow_nan=self.options.allow_nan)
                source = self.files.places[name][0].name
            digests[name] = steps.digest(tensor, source)
            if tensor.data_ptr() != shard.view.data_ptr():
                shard.store(tensor)
