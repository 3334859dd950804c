"""ArchSpec: everything megarlhf knows of an architecture, as data.

One table per family maps configuration fields and weights between Hugging Face and Megatron-Core. Loading, export,
weight sync and the converters all read the same table, so the two directions cannot drift apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby
from typing import Any, Literal

from megarlhf.formats.huggingface import HFConfig


class Split(Enum):
    """How a Megatron weight relates to its HF tensors and is cut over the tensor-parallel group."""

    REPLICATED = "one HF tensor, whole on every rank"
    COLUMN = "one HF tensor, cut along its rows (output features)"
    ROW = "one HF tensor, cut along its columns (input features)"
    VOCAB = "one HF tensor, rows padded to a multiple and cut"
    QKV = "q, k, v interleaved per query group; groups are cut"
    GATE_UP = "gate and up stacked; each is cut along its rows"


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """One Megatron parameter and the HF tensors it holds, in the order the inference engine fuses them.

    `{layer}` and `{expert}` stand for the global layer and expert number, from 0.
    """

    megatron: tuple[str, ...]  # accepted names; the local and TransformerEngine specs place layer norms differently
    hf: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]  # of each HF tensor, as names of ArchSpec.dimensions
    split: Split
    expert: bool = False  # lies on one rank of the expert-parallel group, cut by expert-tensor parallelism
    buffer: bool = False  # Megatron keeps it as a buffer: no gradient

    def at(self, **numbers: int) -> "WeightMap":
        """The same with `{layer}` or `{expert}` filled in."""

        def fill(names: tuple[str, ...]) -> tuple[str, ...]:
            for key, number in numbers.items():
                names = tuple(name.replace(f"{{{key}}}", str(number)) for name in names)
            return names

        return replace(self, megatron=fill(self.megatron), hf=fill(self.hf))


@dataclass(frozen=True, kw_only=True)
class Additions:
    """What a model does that Megatron-Core's configuration has no field for; by default nothing."""

    embedding_scale: float = 1.0
    attention_soft_cap: float | None = None  # an attention score x becomes cap * tanh(x / cap)
    logit_soft_cap: float | None = None  # the same for logits
    norms_after: bool = False  # an RMSNorm of what attention and feed-forward part add to the residual
    window_rope_theta: float | None = None  # RoPE base of layers with a window, where these have their own


VALUE_HEAD = WeightMap(
    megatron=("output_layer.weight",),
    hf=("score.weight",),
    shapes=(("one", "hidden"),),
    split=Split.REPLICATED,
)


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """An architecture family."""

    hf_class: str  # entry of config.json's "architectures"
    config_fields: dict[str, str]  # TransformerConfig field -> HF config field
    config_constants: dict[str, Any]  # TransformerConfig field -> value
    layer_weights: tuple[WeightMap, ...]  # of every layer, without its feed-forward part
    dense_weights: tuple[WeightMap, ...]  # feed-forward part of a dense layer
    moe_weights: tuple[WeightMap, ...] = ()  # feed-forward part of a layer with experts
    model_weights: tuple[WeightMap, ...]  # embedding, final norm, output
    check: Callable[[HFConfig], list[str]]  # what a model computes that Megatron-Core or this table cannot express
    dimensions: Callable[[HFConfig], dict[str, int]]  # sizes that `WeightMap.shapes` names
    check_weights: Callable[[HFConfig], list[str]] = lambda _: []  # what weights mean that the table cannot express
    moe_layers: Callable[[HFConfig], list[bool]] | None = None  # per layer: has experts; None: no layer has
    derived_config: Callable[[HFConfig], dict[str, Any]] = lambda _: {}  # TransformerConfig fields worked out
    additions: Callable[[HFConfig], Additions] = lambda _: Additions()
    reward_class: str | None = None  # where it is not named after `hf_class`
    engine_head: Literal["any", "embedding", "own"] = "any"  # output layer of vLLM's model of this family

    @property
    def sequence_classification_class(self) -> str:
        """The HF class of a reward model of this family."""
        return self.reward_class or self.hf_class.replace("ForCausalLM", "ForSequenceClassification")

    def class_with_head(self, head: str) -> str:
        """The HF class of a model of this family with a head "lm", or "value" as critics and reward models have it."""
        return self.sequence_classification_class if head == "value" else self.hf_class

    def is_moe(self, hf: HFConfig) -> bool:
        """Whether any layer of this configuration has experts."""
        return self.moe_layers is not None and any(self.moe_layers(hf))

    def weight_maps(self, hf: HFConfig, *, tied: bool, head: str) -> Iterator[WeightMap]:
        """Every weight of a model, with layer and expert numbers filled in, in HF order.

        An entry with a dimension of size 0 does not exist in this configuration.

        Args:
            tied: the output layer shares the embedding and has no tensor of its own.
            head: "lm" for vocabulary logits, "value" for one number per token.
        """
        has_experts = self.moe_layers(hf) if self.moe_layers is not None else [False] * hf.num_hidden_layers
        sizes = self.dimensions(hf)
        num_experts = sizes.get("experts", 0)

        def present(weights: tuple[WeightMap, ...]) -> list[WeightMap]:
            return [w for w in weights if all(sizes[name] for shape in w.shapes for name in shape)]

        for weight in self.model_weights:
            if weight.hf == ("lm_head.weight",):
                continue
            if weight.hf == ("model.norm.weight",):
                for layer, experts in enumerate(has_experts):
                    yield from (w.at(layer=layer) for w in present(self.layer_weights))
                    parts = present(self.moe_weights if experts else self.dense_weights)
                    for by_expert, group in groupby((w.at(layer=layer) for w in parts), key=lambda w: w.expert):
                        own = list(group)
                        yield from (w.at(expert=e) for e in range(num_experts) for w in own) if by_expert else own
            yield weight
        if head == "value":
            yield VALUE_HEAD
        elif not tied:
            yield next(w for w in self.model_weights if w.hf == ("lm_head.weight",))
