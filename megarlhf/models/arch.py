"""ArchSpec: everything megarlhf knows of an architecture, as data.

One table per family maps configuration fields and weights between Hugging Face and Megatron-Core. Loading, export,
weight sync and the converters all read the same table, so the two directions cannot drift apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megarlhf.models.hf_files import HFConfig


class Split(Enum):
    """How a Megatron weight relates to its HF tensors and is cut over the tensor-parallel group."""

    REPLICATED = "one HF tensor, whole on every rank"
    ROW = "one HF tensor, cut along its columns (input features)"
    VOCAB = "one HF tensor, rows padded to a multiple and cut"
    QKV = "q, k, v interleaved per query group; groups are cut"
    GATE_UP = "gate and up stacked; each is cut along its rows"


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """One Megatron parameter and the HF tensors it holds, in the order the inference engine fuses them.

    `{layer}` stands for the global layer number, from 0.
    """

    megatron: tuple[str, ...]  # accepted names; the local and TransformerEngine specs place layer norms differently
    hf: tuple[str, ...]
    split: Split


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """An architecture family."""

    hf_class: str  # entry of config.json's "architectures"
    config_fields: dict[str, str]  # TransformerConfig field -> HF config field
    config_constants: dict[str, Any]  # TransformerConfig field -> value
    layer_weights: tuple[WeightMap, ...]
    model_weights: tuple[WeightMap, ...]  # embedding, final norm, output
    check: Callable[[HFConfig], list[str]]  # what Megatron-Core or this table cannot express of a given configuration

    @property
    def sequence_classification_class(self) -> str:
        """The HF class of a reward model of this family."""
        return self.hf_class.replace("ForCausalLM", "ForSequenceClassification")

    def weight_maps(self, num_layers: int, *, tied: bool, head: str) -> Iterator[WeightMap]:
        """Every weight of a model with `num_layers` layers, with layer numbers filled in, in HF order.

        Args:
            tied: the output layer shares the embedding and has no tensor of its own.
            head: "lm" for vocabulary logits, "value" for one number per token.
        """
        for weight in self.model_weights:
            if weight.hf == ("lm_head.weight",):
                continue
            if weight.hf == ("model.norm.weight",):
                for layer in range(num_layers):
                    yield from (_at_layer(w, layer) for w in self.layer_weights)
            yield weight
        if head == "value":
            yield VALUE_HEAD
        elif not tied:
            yield next(w for w in self.model_weights if w.hf == ("lm_head.weight",))


VALUE_HEAD = WeightMap(megatron=("output_layer.weight",), hf=("score.weight",), split=Split.REPLICATED)


def _at_layer(weight: WeightMap, layer: int) -> WeightMap:
    def fill(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.replace("{layer}", str(layer)) for name in names)

    return WeightMap(megatron=fill(weight.megatron), hf=fill(weight.hf), split=weight.split)
