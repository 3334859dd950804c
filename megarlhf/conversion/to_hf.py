"""A Megatron-Core checkpoint as Hugging Face's, a few tensors at a time and bit for bit.

SAVE/model.safetensors, or shards with an index    HF names and shapes, in the dtype they are stored in; of a run's
                                                   checkpoint in its pretrain's, as the run's own export
SAVE/config.json, tokenizer, chat template, ...    from the checkpoint's hf_config/, what a run was trained with, or
                                                   --hf-model
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from megarlhf.config.roles import ROLES
from megarlhf.conversion import steps
from megarlhf.conversion.cuts import CutModel, GlobalWeight, Region, cut_model
from megarlhf.conversion.steps import ConvertOptions, Digests
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.formats.huggingface import INDEX, HFConfig, read_checkpoint, read_config
from megarlhf.formats.megatron import HFFiles, MegatronCheckpoint, find_checkpoint, hf_files, run_pretrain
from megarlhf.formats.run_checkpoints import config_entries
from megarlhf.formats.safetensors_file import TensorFiles, TensorSpec, create_tensor_file, tensor_places
from megarlhf.formats.staging import StagingDirectory
from megarlhf.formats.torch_dist import METADATA, TorchDistReader
from megarlhf.models.arch import Split
from megarlhf.models.build import Head
from megarlhf.models.companions import exported_config, write_companions, write_json
from megarlhf.models.names import check_names, main_dtype, stored_dtypes
from megarlhf.models.registry import find_architecture
from megarlhf.models.shards import Shard, shards_of

_NUMBERED = re.compile(r"^decoder\.layers\.(\d+)\.")


def hf_tensors(weight: GlobalWeight, reader: TorchDistReader, hf: HFConfig) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors of one Megatron parameter, contiguous, read from a checkpoint."""
    param = reader.read(weight.key, weight.region.offset, weight.region.shape, weight.num_stacked)
    for shard in shards_of(weight.weight, param, hf, tp_rank=0, tp_size=1):
        yield shard.hf_name, hf_form(shard, param)


def hf_form(shard: Shard, param: Tensor) -> Tensor:
    """A whole HF tensor inside a parameter in its own shape, contiguous; a copy where it does not lie together."""
    return shard.view.reshape(-1, *param.shape[1:]).contiguous()


def reading_bytes(weight: GlobalWeight, reader: TorchDistReader) -> int:
    """Memory that `hf_tensors` takes: the parameter, beside it first a chunk of several, then a copy of q, k or v."""
    chunk = math.prod(reader.tensors[weight.key].chunks[0].sizes)  # the others are as large, or nearly so
    copied = weight.num_elements if weight.weight.split is Split.QKV else 0
    besides = max(copied, 0 if chunk == weight.num_elements else chunk)
    return (weight.num_elements + besides) * reader.dtype(weight.key).itemsize


def megatron_to_hf(
    load: str, save: Path, *, hf_model: str | None, role: str, max_shard_bytes: int, options: ConvertOptions
) -> None:
    """Convert; a checkpoint with a value head becomes a sequence classifier with one label.

    Where options.dtype is None, a run's checkpoint gets its pretrain's dtypes, as export_hf writes it, and any other
    keeps what is stored.

    Args:
        load: see find_checkpoint.
        hf_model: directory of the configuration and tokenizer; None for what the checkpoint says.
        role: which model of a run's checkpoint.
    Raises:
        ValueError: a checkpoint or target that cannot be converted; nothing has been written then, but for tensors with
            NaN, which are found on the way.
    """
    checkpoint = find_checkpoint(load, role)
    files_of = hf_files(checkpoint, hf_model, ROLES[role].checkpoint)
    template = _chat_template(files_of)
    hf = read_config(files_of.directory, option="hf_model")
    arch = find_architecture(hf)
    reader = TorchDistReader(checkpoint.directory, checkpoint.source)
    head = _head(reader, hf)
    model = cut_model(arch, hf, head=head)
    weights, shapes = _locate(model, reader), model.names.hf_shapes
    dtypes = _dtypes(weights, reader, options.dtype, {} if options.dtype else _run_dtypes(checkpoint, role, head))

    def num_bytes(weight: GlobalWeight) -> int:
        return sum(math.prod(shapes[name]) * dtypes[name].itemsize for name in weight.weight.hf)

    def needed(weight: GlobalWeight) -> int:
        is_converted = any(dtypes[name] != reader.dtype(weight.key) for name in weight.weight.hf)
        return reading_bytes(weight, reader) + (num_bytes(weight) if is_converted else 0)

    steps.check_target(checkpoint.directory, save, sum(map(num_bytes, weights)), overwrite=options.overwrite)
    if options.dry_run:
        return
    layout, index = _files({n: TensorSpec(n, shape, dtypes[n]) for n, shape in shapes.items()}, max_shard_bytes)
    about = {"source": str(checkpoint.directory), "architecture": arch.hf_class, "head": head}
    bundles = steps.bundles(weights, num_bytes)
    contents = {name: [repr(spec) for spec in file] for name, file in layout.items()}
    stored = steps.fingerprint([reader.directory / METADATA])
    identity = {**about, "files": stored, "layout": contents, "steps": list(bundles)}
    with StagingDirectory(save, identity) as staging:
        files = TensorFiles([_prepare(staging.path / name, file) for name, file in layout.items()], writable=True)
        memory = steps.Memory(max(map(needed, weights)))

        def write_weight(weight: GlobalWeight) -> Digests:  # by itself: no name may keep memory that was given back
            digests: Digests = {}
            for name, tensor in hf_tensors(weight, reader, hf):
                result = steps.converted(name, tensor, dtypes[name], allow_nan=options.allow_nan)
                digests[name] = steps.digest(result, weight.key)
                files.write(name, result)
            return digests

        def write(_: str, bundle: list[GlobalWeight]) -> Digests:
            digests: Digests = {}
            for weight in bundle:
                with memory.lend(0, besides=needed(weight)):
                    digests |= write_weight(weight)
            files.sync(list(digests))
            return digests

        def verify(_: str, bundle: list[GlobalWeight]) -> None:
            for weight in bundle:
                with memory.lend(0, besides=num_bytes(weight)):
                    found = ((name, files.read(name)) for name in weight.weight.hf)
                    steps.check_manifest(found, manifest, f"save={save}")

        steps.run(bundles, write, num_bytes, phase="convert", staging=staging, options=options)
        manifest = {name: entry for record in staging.done.values() for name, entry in record.items()}
        steps.write_manifest(staging.path, manifest, **about, iteration=checkpoint.iteration)
        config = exported_config(files_of.directory, hf, arch.class_with_head(head), main_dtype(shapes, dtypes))
        write_json(staging.path / "config.json", config | config_entries(checkpoint.directory))
        write_companions(staging.path, files_of.directory, tokenizer=files_of.tokenizer, chat_template=template)
        if len(layout) > 1:
            write_json(staging.path / INDEX, index)
        if options.verify:
            steps.run(bundles, verify, num_bytes, phase="verify", staging=None, options=options)
        files.close()


def _chat_template(files: HFFiles) -> str | None:
    """Text of the template that a run was given, as a path, a name, or the text itself."""
    if files.chat_template is None:
        return None
    return str(load_tokenizer(str(files.tokenizer), chat_template=files.chat_template).chat_template)


def _files(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> tuple[dict[str, list[TensorSpec]], dict[str, Any]]:
    """Tensors of each weight file, and the index over the files."""
    split = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    layout = {  # wider types first, as the format has them aligned
        file: sorted((specs[name] for name in names), key=lambda spec: -spec.dtype.itemsize)
        for file, names in split.filename_to_tensors.items()
    }
    return layout, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def _head(reader: TorchDistReader, hf: HFConfig) -> Head:
    """By what is stored; an output layer of its own unties the embedding, whatever the configuration says."""
    output = reader.tensors.get("output_layer.weight")
    if output is not None and output.size[0] == 1:
        return "value"
    if output is not None:
        hf.tie_word_embeddings = False  # as in read_checkpoint
    return "lm"


def _run_dtypes(checkpoint: MegatronCheckpoint, role: str, head: Head) -> dict[str, torch.dtype]:
    """The dtypes that the run of a checkpoint exports in, its pretrain's; empty where what is stored is kept."""
    if (pretrain := run_pretrain(checkpoint, ROLES[role].checkpoint)) is None:
        return {}
    try:
        hf, source = read_checkpoint(pretrain)
        arch = find_architecture(hf)
        check_names(arch, hf, source, head)
        return stored_dtypes(arch, hf, source, head)
    except ValueError as error:
        print(f"dtype: kept as stored, since the run's export dtype cannot be read: {error}")
        return {}


def _dtypes(
    weights: list[GlobalWeight], reader: TorchDistReader, wanted: torch.dtype | None, of_run: dict[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """The dtype of every HF tensor in the target; what Megatron-Core keeps as buffers is not converted."""
    found: dict[str, torch.dtype] = {}
    for weight in weights:
        dtype = reader.dtype(weight.key) if weight.weight.buffer or wanted is None else wanted
        found |= {name: of_run.get(name, dtype) for name in weight.weight.hf}
    return found


def _locate(model: CutModel, reader: TorchDistReader) -> list[GlobalWeight]:
    """The model's weights where this checkpoint has them.

    Layer norms may carry the names of either layer implementation, and layers be stacked in one tensor or numbered.

    Raises:
        ValueError: missing, unknown and wrongly shaped tensors, all of them named.
    """
    found, problems = [], []
    for weight in model.weights:
        forms = _forms(weight, model.names.hf.num_hidden_layers)
        place = next((form for form in forms if form.key in reader.tensors), None)
        if place is None:
            problems.append(f"missing {weight.key}")
            continue
        size, expected = tuple(reader.tensors[place.key].size), place.tensor_shape
        if weight.weight.split is Split.VOCAB:  # padded to any number of rows
            rows = model.names.hf.vocab_size
            place = replace(place, region=replace(place.region, shape=(rows, *place.shape[1:])))
            expected = (max(rows, size[0]), *expected[1:])
        if size != expected:
            problems.append(f"{place.key} has shape {size}, config.json says {expected}")
        found.append(place)
    keys = {place.key for place in found}
    unknown = [k for k in reader.tensors if k not in keys and not k.startswith(("optimizer.", "chained_"))]
    problems = list(dict.fromkeys(problems)) + [f"unknown {key}" for key in unknown]
    if problems:
        raise ValueError(f"{reader.source}; it does not hold this {model.names.arch.hf_class}: " + "; ".join(problems))
    return found


def _forms(weight: GlobalWeight, num_layers: int) -> Iterator[GlobalWeight]:
    """The weight under each key that Megatron-Core may store it."""
    yield weight
    layer = _NUMBERED.match(weight.weight.megatron[0])
    if layer is None:
        return
    shape, offset, size = weight.tensor_shape, weight.region.offset, weight.region.shape
    numbered = stacked = weight
    if _NUMBERED.match(weight.key):
        region = Region(offset=(int(layer[1]), *offset), shape=(1, *size))
        stacked = replace(weight, tensor_shape=(num_layers, *shape), region=region, num_stacked=weight.num_stacked + 1)
    else:
        region = Region(offset=offset[1:], shape=size[1:])
        numbered = replace(weight, tensor_shape=shape[1:], region=region, num_stacked=weight.num_stacked - 1)
    for key in (weight.key, *weight.weight.megatron):
        short = _NUMBERED.sub("decoder.layers.", key)
        yield replace(numbered, key=short.replace("decoder.layers.", layer[0], 1))
        yield replace(stacked, key=short)


def _prepare(path: Path, specs: list[TensorSpec]) -> Path:
    """Make a weight file of zeros, unless an earlier try has left it."""
    with suppress(FileNotFoundError, ValueError):  # ValueError: its making was interrupted
        if [spec for _, spec in tensor_places(path).values()] == specs:
            return path
    path.unlink(missing_ok=True)
    create_tensor_file(path, specs)
    path.chmod(0o644)
    return path
