"""A Hugging Face checkpoint as Megatron-Core's, a few tensors at a time and bit for bit.

    SAVE/latest_checkpointed_iteration.txt     "release"
    SAVE/release/                              torch_dist: tensors of the whole model, cut for the target sizes
    SAVE/hf_config/                            config.json, tokenizer and the like, for the way back

Any layout loads the result; the target sizes decide into which chunks and files the tensors are cut.
"""

import os
from collections.abc import Iterator
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
from megarlhf.models.cuts import GlobalWeight, cut_model
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
    model = cut_model(arch, hf, head=kind, tensor=tensor, pipeline=pipeline, expert=expert)
    model.names.check_names(source)
    files = TensorFiles([load / name for name in source.files])
    dtypes = {weight.weight.hf: _dtype(weight, files, options) for weight in model.weights}

    def num_bytes(weight: GlobalWeight) -> int:
        return weight.num_elements * dtypes[weight.weight.hf].itemsize

    check_target(load, save, overwrite=options.overwrite)
    check_space(save, sum(map(num_bytes, model.weights)))
    if options.dry_run:
        return
    layout = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
    about = {"source": str(load), "architecture": arch.hf_class, "head": kind, "layout": layout}
    identity = {**about, "dtype": str(options.dtype), "files": fingerprint([load / name for name in source.files])}
    partial = PartialDirectory(save, identity)
    target = partial.path / RELEASE
    target.mkdir(exist_ok=True)

    def step(name: str, bundle: list[GlobalWeight]) -> dict[str, Any]:
        digests: Digests = {}
        chunks = []
        with open(target / f"__{name}.distcp", "wb") as file:
            for weight in bundle:
                param = _parameter(weight, dtypes[weight.weight.hf], files, model.names.hf, digests, options)
                for offset, shape, chunk in _chunks(weight, param):
                    chunks.append((weight.key, offset, shape, (f"__{name}.distcp", *write_tensor(file, chunk))))
            file.flush()
            os.fsync(file.fileno())
        return {"digests": digests, "chunks": chunks}

    steps = bundles(model.weights, num_bytes)
    try:
        run_steps(steps, step, num_bytes, phase="convert", partial=partial, options=options)
    except ValueError:
        partial.discard()
        raise
    places: dict[str, dict[tuple[int, ...], Any]] = {}
    for record in partial.done.values():
        for key, offset, shape, place in record["chunks"]:
            places.setdefault(key, {})[tuple(offset)] = (shape, place)
    described = {w.key: (w.tensor_shape, dtypes[w.weight.hf]) for w in model.weights}
    write_metadata(target, described, places, write_objects(target, "__objects.distcp", model.objects))
    # As Megatron-LM expects them: the format's version, and no step of training done.
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, target / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(target))
    companions = partial.path / HF_CONFIG
    companions.mkdir(exist_ok=True)
    (companions / "config.json").write_bytes((load / "config.json").read_bytes())
    copy_companions(load, companions)
    manifest = {name: entry for record in partial.done.values() for name, entry in record["digests"].items()}
    left_out = sorted(set(source.names()) - manifest.keys())
    write_manifest(target, manifest, **about, left_out=left_out)
    (partial.path / LATEST).write_text(RELEASE)
    if options.verify:
        reader = TorchDistReader(target, f"save={save}")

        def check(name: str, bundle: list[GlobalWeight]) -> int:
            return sum(compare(hf_tensors(weight, reader, model.names.hf), manifest, save) for weight in bundle)

        run_steps(steps, check, num_bytes, phase="verify", partial=None, options=options)
    partial.finish()


def _dtype(weight: GlobalWeight, files: TensorFiles, options: ConvertOptions) -> torch.dtype:
    """The dtype of a weight in the target; a drawn one has the embedding's."""
    names = [name for name in weight.weight.hf if name in files.places] or ["model.embed_tokens.weight"]
    found = {files.dtype(name) for name in names}
    if len(found) > 1 or not found <= set(DTYPES.values()):
        raise ValueError(f"tensors {names} have dtypes {sorted(map(str, found))}; one of {', '.join(DTYPES)} for all")
    return options.dtype or found.pop()


def _parameter(
    weight: GlobalWeight,
    dtype: torch.dtype,
    files: TensorFiles,
    hf: HFConfig,
    digests: Digests,
    options: ConvertOptions,
) -> Tensor:
    """The whole Megatron parameter, and its HF tensors' entries in the manifest."""
    param = torch.empty(weight.shape, dtype=dtype)
    if weight.weight.split is Split.VOCAB:
        param[hf.vocab_size :] = 0
    for shard in parts(weight, param, hf):
        name = shard.hf_name
        if name not in files.places:
            drawn = drawn_value_weights(hf.hidden_size, _SEED).to(dtype)
            digests[name] = digest(drawn, f"drawn with seed {_SEED}")
            shard.store(drawn)
        elif shard.view.is_contiguous() and files.dtype(name) == dtype:
            files.read_into(name, shard.view)
            converted(name, shard.view, options)
            digests[name] = digest(shard.view, files.places[name][0].name)
        else:
            tensor = converted(name, files.read(name), options)
            digests[name] = digest(tensor, files.places[name][0].name)
            shard.store(tensor)
    return param


def _chunks(weight: GlobalWeight, param: Tensor) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """Offset, shape and numbers of each chunk of the layout."""
    whole, origin = param.view(weight.region.shape), weight.region.offset
    for chunk in weight.chunks:
        start = [place - first for place, first in zip(chunk.offset, origin, strict=True)]
        inside = tuple(slice(s, s + length) for s, length in zip(start, chunk.shape, strict=True))
        yield chunk.offset, chunk.shape, whole[inside]
