"""The conformance models' every number differs from what would stand in for it, if a table forgot the field.

Which fields the tables read is not listed here: a model is built of a configuration that notes what is asked of it.
"""

from collections import defaultdict
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from megarlhf.formats.huggingface import read_config
from megarlhf.models.arch import ArchSpec
from megarlhf.models.build import ModelOptions, build_model
from megarlhf.models.registry import find_architecture
from megarlhf.parallel.groups import ParallelSizes, fake_world
from tests.conformance.test_transformers import MODELS
from tests.tiny_models import make_model

ROPE_TYPE = {"rope_parameters.rope_type"}
LATENT = {"head_dim", "rms_norm_eps"}  # of RoPE's channels, and the only one that the check lets through
# What a family has one way of doing, or a check lets through with one value.
FIXED: dict[str, set[str]] = {
    "llama": set(),
    "mistral": ROPE_TYPE,
    "qwen2": ROPE_TYPE,
    "qwen3": ROPE_TYPE,
    "mixtral": ROPE_TYPE | {"megatron.moe_router_pre_softmax"},
    "qwen2-moe": ROPE_TYPE,
    "qwen3-moe": ROPE_TYPE,
    "gemma2": ROPE_TYPE,
    "gemma3": {"attn_logit_softcapping"},
    "deepseek-v2": LATENT | {"num_key_value_heads", "norm_topk_prob"},
    "deepseek-v3": LATENT | {"norm_topk_prob", "megatron.moe_router_pre_softmax"},
}
FAMILIES = sorted({options["family"] for options in MODELS.values()})


class NotingDict(dict[str, Any]):
    """A dictionary that notes which keys are asked for."""

    def __init__(self, content: dict[str, Any], name: str, asked: dict[str, Any]) -> None:
        super().__init__(content)
        self._name, self._asked = name, asked

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        name = f"{self._name}.{key}"
        if isinstance(value, dict):
            return NotingDict(value, name, self._asked)
        self._asked[name] = value
        return value


class NotingConfig:
    """A configuration that notes which fields are asked for."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._config, self.asked = config, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if isinstance(value, dict):
            return NotingDict(value, name, self.asked)
        self.asked[name] = value
        return value


def lookup(config: PretrainedConfig, name: str) -> Any:
    """A field, or a key of a dictionary in one."""
    first, *rest = name.split(".")
    value = getattr(config, first, None)
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def stand_ins(config: PretrainedConfig, name: str) -> list[Any]:
    """What Transformers would take for a field: of an empty configuration, and of this one without the field."""
    first, *rest = name.split(".")
    content = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    found = [lookup(type(config)(), name)]
    if not rest:
        try:
            found.append(lookup(type(config)(**{k: v for k, v in content.items() if k != first}), name))
        except StrictDataclassError:
            pass  # it cannot be left out
    return found


def differing(arch: ArchSpec, config: PretrainedConfig) -> tuple[set[str], set[str]]:
    """Fields that were asked for, and those of them that differ from every default.

    Fields of Megatron-Core's configuration are called "megatron.NAME".
    """
    noting: Any = NotingConfig(config)
    with fake_world(ParallelSizes(), rank=0, world_size=1) as ranks:
        _, built = build_model(arch, noting, ranks, ModelOptions(), head="lm", seed=0)
    given = arch.megatron_fields(config).keys() - arch.config_constants.keys()
    defaults = {field.name: field.default for field in fields(type(built)) if field.default is not MISSING}
    megatron = {f"megatron.{name}": getattr(built, name) != defaults.get(name, MISSING) for name in given}
    hf = {name: all(value != other for other in stand_ins(config, name)) for name, value in noting.asked.items()}
    return {*hf, *megatron}, {name for name, differs in (hf | megatron).items() if differs}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_default_can_stand_in_for_a_field(tmp_path: Path, family: str) -> None:
    """In at least one of a family's models."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, options in MODELS.items():
        if options["family"] == family:
            config = read_config(make_model(tmp_path / name, **options))
            asked, differs = differing(find_architecture(config), config)
            found["asked"] |= asked
            found["differs"] |= differs
    assert {"vocab_size", "rms_norm_eps", "num_hidden_layers", "megatron.layernorm_epsilon"} <= found["asked"]
    assert found["asked"] - found["differs"] == FIXED[family]
