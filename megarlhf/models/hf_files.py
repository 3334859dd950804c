"""Hugging Face checkpoint directories: configuration, safetensors shards and the files that go along."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

HFConfig = PretrainedConfig
_CLASSIFIER = "ForSequenceClassification"  # how a reward model's class ends
INDEX = "model.safetensors.index.json"
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def read_config(directory: str | Path, *, option: str = "pretrain") -> HFConfig:
    """The model's configuration; never runs code from the directory.

    Args:
        option: what gave the directory, for messages.
    Raises:
        ValueError: no readable config.json there.
    """
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"{option}={directory}; it has no config.json: give a local Hugging Face checkpoint directory")
    return AutoConfig.from_pretrained(str(directory), trust_remote_code=False)


class HFWeights:
    """Tensors of a checkpoint by name, read slice by slice from its safetensors files.

    Args:
        option: what gave the directory, for messages.
    Raises:
        ValueError: no safetensors, an index that names a missing file or tensor, or a file that is cut short.
    """

    def __init__(self, directory: str | Path, *, option: str = "pretrain") -> None:
        self.directory, self.source = Path(directory), f"{option}={directory}"
        index, weight_map = self.directory / INDEX, dict[str, str]()
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
        self.files = sorted(set(weight_map.values())) or ["model.safetensors"]
        missing = [name for name in self.files if not (self.directory / name).is_file()]
        if missing:
            raise ValueError(f"{self.source}; missing weight files {missing} (only safetensors are read)")
        self._files: dict[str, Any] = {}
        for name in self.files:
            try:
                handle = safe_open(str(self.directory / name), framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.source}; {name} is not a whole safetensors file: {error}") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))
        absent = sorted(weight_map.keys() - self._files.keys())
        if absent:
            raise ValueError(f"{self.source}; {INDEX} lists tensors that its files do not hold: {absent}")
        unlisted = sorted(self._files.keys() - weight_map.keys()) if weight_map else []
        if unlisted:
            raise ValueError(f"{self.source}; {INDEX} leaves out tensors that its files hold: {unlisted}")

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


def has_score_head(config: HFConfig) -> bool:
    """Whether it is a reward model, of which a value head starts."""
    return any(name.endswith(_CLASSIFIER) for name in config.architectures or [])


def exported_config(source: str | Path, hf_class: str) -> dict[str, Any]:
    """config.json of an exported model: the source's, naming the class that reads the weights."""
    config: dict[str, Any] = json.loads((Path(source) / "config.json").read_text())
    if hf_class.endswith(_CLASSIFIER):
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | {"architectures": [hf_class]}


def copy_companions(source: str | Path, target: str | Path) -> None:
    """Copy tokenizer, chat template and generation configuration beside exported weights."""
    for name in _COMPANIONS:
        if (Path(source) / name).is_file():
            shutil.copy2(Path(source) / name, Path(target) / name)
