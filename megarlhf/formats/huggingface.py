"""Hugging Face checkpoint directories: configuration and safetensors shards."""

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megarlhf.formats.json_files import one_line, read_json_object

HFConfig = PretrainedConfig
CLASSIFIER = "ForSequenceClassification"  # how a reward model's class ends
INDEX = "model.safetensors.index.json"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SLICE_BYTES = 16 * 2**20  # of a tensor that is compared with another
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings"
).split()


def read_config(directory: str | Path, *, option: str = "pretrain") -> HFConfig:
    """The model's configuration as its config.json has it; never runs code from the directory.

    Args:
        option: what gave the directory, for messages.
    Raises:
        ValueError: no config.json there, or one that Transformers refuses or whose sizes are no sizes.
    """
    source = f"{option}={directory}"
    content = read_json_object(Path(directory) / "config.json", source)
    named = content.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"{source}; config.json has architectures={named!r}: it is a list of class names")
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # its fields are checked by code of many kinds, which raises errors of many kinds
        raise ValueError(f"{source}; Transformers refuses config.json ({one_line(error)}): repair it") from error
    sizes = {name: getattr(config, name, 1) for name in _SIZES}
    if getattr(config, "head_dim", None) is not None:
        sizes["head_dim"] = config.head_dim
    wrong = [f"{name}={value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]
    if wrong:
        raise ValueError(f"{source}; config.json has {', '.join(wrong)}: sizes are integers from 1 on")
    return config


class HFWeights:
    """Tensors of a checkpoint by name, read slice by slice from its safetensors files.

    Args:
        option: what gave the directory, for messages.
    Raises:
        ValueError: no safetensors, an index that names a missing file or tensor, or a file that is cut short.
    """

    def __init__(self, directory: str | Path, *, option: str = "pretrain") -> None:
        self.directory, self.source = Path(directory), f"{option}={directory}"
        index = self.directory / INDEX  # weight_map is empty where there is none
        weight_map = read_json_object(index, self.source).get("weight_map") if index.is_file() else {}
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{self.source}; {INDEX} has no weight_map from tensors to file names: repair it")
        self.files = sorted(set(weight_map.values())) or ["model.safetensors"]
        missing = [name for name in self.files if not (self.directory / name).is_file()]
        if missing:
            named = f", which {INDEX} names" if weight_map else ""
            raise ValueError(f"{self.source}; missing weight files {missing}{named} (only safetensors are read)")
        self._files: dict[str, Any] = {}
        for name in self.files:
            try:
                handle = safe_open(str(self.directory / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.source}; {name} is not a whole safetensors file: {error}") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))
        absent = sorted(weight_map.keys() - self._files.keys())
        if absent:
            raise ValueError(f"{self.source}; {INDEX} lists tensors that its files do not hold: {shortened(absent)}")
        unlisted = sorted(self._files.keys() - weight_map.keys()) if weight_map else []
        if unlisted:
            raise ValueError(f"{self.source}; {INDEX} leaves out tensors that its files hold: {shortened(unlisted)}")

    def names(self) -> list[str]:
        """Every tensor's name."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's safetensors dtype, such as "F32" or "BF16"."""
        return str(self._files[name].get_slice(name).get_dtype())

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """The part of a tensor that `index` selects; reads those bytes only."""
        return self._files[name].get_slice(name)[index if len(index) > 1 else index[0]]

    def fingerprint(self) -> str:
        """Of names, shapes and dtypes, and of each tensor's first row: another training's weights have another."""
        digest = hashlib.sha256()
        for name in self.names():
            digest.update(f"{name} {self.shape(name)} {self.dtype(name)}".encode())
            digest.update(self.read(name, (slice(0, 1),)).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; reads both once, some rows at a time."""
        shape = self.shape(name)
        if shape != self.shape(other) or not shape:
            return False
        row = max(1, self.read(name, (slice(0, 1),)).nbytes)
        step = max(1, _SLICE_BYTES // row)
        rows = [(slice(start, start + step),) for start in range(0, shape[0], step)]
        return all(bool((self.read(name, part) == self.read(other, part)).all()) for part in rows)


def read_checkpoint(directory: str | PathLike[str], *, option: str = "pretrain") -> tuple[HFConfig, HFWeights]:
    """Configuration and opened weights; `tie_word_embeddings` says what the weights say.

    A checkpoint whose config.json ties the output layer to the embedding may store another `lm_head.weight`. Then it is
    not tied, as in Transformers (PreTrainedModel.tie_weights) and vLLM (maybe_retie_word_embeddings). Everything here
    that asks whether a model is tied asks the configuration that this function returns.

    Raises:
        ValueError: see read_config and HFWeights.
    """
    config, weights = read_config(Path(directory), option=option), HFWeights(Path(directory), option=option)
    if config.tie_word_embeddings and {EMBEDDING, LM_HEAD} <= set(weights.names()):
        config.tie_word_embeddings = weights.equal(EMBEDDING, LM_HEAD)
    return config, weights


def has_score_head(config: HFConfig) -> bool:
    """Whether it is a reward model, of which a value head starts."""
    return any(name.endswith(CLASSIFIER) for name in config.architectures or [])


def shortened(names: list[str]) -> str:
    """A list of names as text, the first eight of them."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{names[:8]}{rest}"
