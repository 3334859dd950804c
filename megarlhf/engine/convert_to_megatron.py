"""A Hugging Face checkpoint as Megatron-Core's, a few tensors at a time and bit for bit.

    SAVE/latest_checkpointed_iteration.txt     "release"
    SAVE/release/                              torch_dist: tensors of the whole model, cut for the target sizes
    SAVE/hf_config/                            config.json, tokenizer and the like, for the way back

Any layout loads the result; the target sizes decide into which chunks and files the tensors are cut.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from megarlhf.data.partial import PartialDirectory
from megarlhf.engine.checkpoint_files import LATEST
from megarlhf.engine.conversion import (
    DTYPES,
    ConvertOptions,
    Digests,
    Scratch,
    TensorFiles,
    bundles,
    check_space,
    check_target,
    compare,
    converted,
    digest,
    fingerprint,
    run_steps,
    write_manifest,
)
from megarlhf.engine.convert_to_hf import hf_tensors, parts
from megarlhf.engine.megatron_files import HF_CONFIG, RELEASE
from megarlhf.models.arch import Split
from megarlhf.models.build import Head
from megarlhf.models.cuts import CutModel, GlobalWeight, cut_model
from megarlhf.models.heads import drawn_value_weights
from megarlhf.models.hf_files import HFConfig, HFWeights, copy_companions, read_config
from megarlhf.models.registry import find_architecture
from megarlhf.models.torch_dist import TorchDistReader, write_metadata, write_objects, write_tensor

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
    hf = read_config(load, option="load")
    arch = find_architecture(hf)
    source = HFWeights(load, option="load")
    has_score = any(name.endswith("ForSequenceClassification") for name in hf.architectures or [])
    kind: Head = head or ("value" if has_score else "lm")
    if has_score and kind == "value" and "score.weight" not in source.names():
        raise ValueError(f"load={load}; a sequence classifier without its head: missing ['score.weight']")
    model = cut_model(arch, hf, head=kind, tensor=tensor, pipeline=pipeline, expert=expert)
    model.names.check_names(source)
    paths = [load / name for name in source.files]
    work = _Conversion(hf=hf, model=model, files=TensorFiles(paths), options=options)
    check_target(load, save, overwrite=options.overwrite)
    check_space(save, sum(map(work.num_bytes, model.weights)))
    if options.dry_run:
        return
    layout = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
    about = {"source": str(load), "architecture": arch.hf_class, "head": kind, "layout": layout}
    steps = bundles(model.weights, work.num_bytes)
    identity = {**about, "dtype": str(options.dtype), "files": fingerprint(paths), "steps": list(steps)}
    with PartialDirectory(save, identity) as partial:
        target = partial.path / RELEASE
        target.mkdir(exist_ok=True)
        run_steps(steps, bind(work.write, target), work.num_bytes, phase="convert", partial=partial, options=options)
        work.describe(target, [chunk for record in partial.done.values() for chunk in record["chunks"]])
        manifest = {name: entry for record in partial.done.values() for name, entry in record["digests"].items()}
        write_manifest(target, manifest, **about, left_out=sorted(set(source.names()) - manifest.keys()))
        companions = partial.path / HF_CONFIG
        companions.mkdir(exist_ok=True)
        shutil.copyfile(load / "config.json", companions / "config.json")
        copy_companions(load, companions)
        (partial.path / LATEST).write_text(RELEASE)
        if options.verify:
            check = bind(work.verify, TorchDistReader(target, f"save={save}"), manifest)
            run_steps(steps, check, work.num_bytes, phase="verify", partial=None, options=options)


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    """What the steps share."""

    hf: HFConfig
    model: CutModel
    files: TensorFiles
    options: ConvertOptions
    scratch: Scratch = field(default_factory=Scratch)

    def dtype(self, weight: GlobalWeight) -> torch.dtype:
        """The dtype of a weight in the target; a drawn one has the embedding's."""
        names = [name for name in weight.weight.hf if name in self.files.places] or ["model.embed_tokens.weight"]
        found = {self.files.dtype(name) for name in names}
        if len(found) > 1 or not found <= set(DTYPES.values()):
            kinds = sorted(str(dtype).removeprefix("torch.") for dtype in found)
            raise ValueError(f"tensors {names} have dtypes {kinds}; one of {', '.join(DTYPES)} for all")
        return self.options.dtype or found.pop()

    def num_bytes(self, weight: GlobalWeight) -> int:
        """Bytes of a weight in the target."""
        return weight.num_elements * self.dtype(weight).itemsize

    def write(self, target: Path, name: str, bundle: list[GlobalWeight]) -> dict[str, Any]:
        """One file of the target; its chunks' places and its HF tensors' entries in the manifest."""
        digests: Digests = {}
        chunks = []
        file_name = f"__{name}.distcp"
        with open(target / file_name, "wb") as file:
            for weight in bundle:
                param = self._parameter(weight, digests)
                for offset, shape, chunk in _chunks(weight, param):
                    chunks.append((weight.key, offset, shape, (file_name, *write_tensor(file, chunk))))
            file.flush()
            os.fsync(file.fileno())
        return {"digests": digests, "chunks": chunks}

    def _parameter(self, weight: GlobalWeight, digests: Digests) -> Tensor:
        """The whole Megatron parameter; fills in its HF tensors' entries in the manifest."""
        param = self.scratch.tensor(weight.shape, self.dtype(weight))
        if weight.weight.split is Split.VOCAB:
            param[self.hf.vocab_size :] = 0
        for shard in parts(weight, param, self.hf):
            name, source = shard.hf_name, f"drawn with seed {_SEED}"
            if name not in self.files.places:
                tensor = drawn_value_weights(self.hf.hidden_size, _SEED).to(param.dtype)
            elif shard.view.is_contiguous() and self.files.dtype(name) == param.dtype:
                self.files.read_into(name, shard.view)
                tensor, source = converted(name, shard.view, self.options), self.files.file_name(name)
            else:
                tensor, source = converted(name, self.files.read(name), self.options), self.files.file_name(name)
            digests[name] = digest(tensor, source)
            if tensor is not shard.view:
                shard.store(tensor)
        return param

    def describe(self, target: Path, chunks: Sequence[Any]) -> None:
        """The files that tell Megatron-Core and Megatron-LM what the directory holds."""
        places: dict[str, dict[tuple[int, ...], Any]] = {}
        for key, offset, shape, place in chunks:
            places.setdefault(key, {})[tuple(offset)] = (shape, place)
        tensors = {weight.key: (weight.tensor_shape, self.dtype(weight)) for weight in self.model.weights}
        write_metadata(target, tensors, places, write_objects(target, "__objects.distcp", self.model.objects))
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, target / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(target))

    def verify(self, reader: TorchDistReader, manifest: Digests, _: str, bundle: list[GlobalWeight]) -> None:
        """Read a step's weights back and compare them with the manifest."""
        for weight in bundle:
            compare(hf_tensors(weight, reader, self.hf), manifest, reader.source)


def _chunks(weight: GlobalWeight, param: Tensor) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """Offset, shape and numbers of each chunk of the layout."""
    whole, origin = param.view(weight.region.shape), weight.region.offset
    for chunk in weight.chunks:
        start = [place - first for place, first in zip(chunk.offset, origin, strict=True)]
        inside = tuple(slice(s, s + length) for s, length in zip(start, chunk.shape, strict=True))
        yield chunk.offset, chunk.shape, whole[inside]
