"""ArchSpec: everything megarlhf knows of an architecture, as data.

One table per family maps configuration fields and weights between Hugging Face and Megatron-Core. Loading, export,
weight sync and the converters all read the same table, so the two directions cannot drift apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby
from typing import Any, Literal

from megarlhf.formats.huggingface import EMBEDDING, LM_HEAD, HFConfig


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

    In a table `{layer}` and `{expert}` stand for the global layer and expert number, from 0, which `at` fills in.
    """

    megatron: tuple[str, ...]  # accepted names; the local and TransformerEngine specs place layer norms differently
    hf: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]  # of each HF tensor, as names of ArchSpec.dimensions
    split: Split
    expert: bool = False  # lies on one rank of the expert-parallel group, cut by expert-tensor parallelism
    buffer: bool = False  # Megatron keeps it as a buffer: no gradient
    layer_number: int | None = None
    expert_number: int | None = None

    def at(self, kind: Literal["layer", "expert"], number: int) -> "WeightMap":
        """The weight of one layer, or of one expert in it."""
        megatron, hf = (
            tuple(n.replace(f"{{{kind}}}", str(number)) for n in names) for names in (self.megatron, self.hf)
        )
        numbers: dict[str, Any] = {f"{kind}_number": number}
        return replace(self, megatron=megatron, hf=hf, **numbers)


@dataclass(frozen=True, kw_only=True)
class Additions:
    """What a model does that Megatron-Core's configuration has no field for; by default nothing."""

    embedding_scale: float = 1.0
    attention_soft_cap: float | None = None  # an attention score x becomes cap * tanh(x / cap)
    logit_soft_cap: float | None = None  # the same for logits
    norms_after: bool = False  # an RMSNorm of what attention and feed-forward part add to the residual
    window_rope_theta: float | None = None  # RoPE base of layers with a window, where these have their own


def _of_model(split: Split, megatron: str, hf: str, *shape: str) -> WeightMap:
    return WeightMap(megatron=(megatron,), hf=(hf,), shapes=(shape,), split=split)


_EMBEDDING = _of_model(Split.VOCAB, "embedding.word_embeddings.weight", EMBEDDING, "vocab", "hidden")
_FINAL_NORM = _of_model(Split.REPLICATED, "decoder.final_layernorm.weight", "model.norm.weight", "hidden")
_LM_HEAD = _of_model(Split.VOCAB, "output_layer.weight", LM_HEAD, "vocab", "hidden")
_VALUE_HEAD = _of_model(Split.REPLICATED, "output_layer.weight", "score.weight", "one", "hidden")


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """An architecture family."""

    hf_class: str  # entry of config.json's "architectures"
    config_fields: dict[str, str]  # TransformerConfig field -> HF config field
    config_constants: dict[str, Any]  # TransformerConfig field -> value
    layer_weights: tuple[WeightMap, ...]  # of every layer, without its feed-forward part
    dense_weights: tuple[WeightMap, ...]  # feed-forward part of a dense layer
    moe_weights: tuple[WeightMap, ...] = ()  # feed-forward part of a layer with experts
    check: Callable[[HFConfig], list[str]]  # what a model computes that Megatron-Core or this table cannot express
    dimensions: Callable[[HFConfig], dict[str, int]]  # sizes that `WeightMap.shapes` names
    check_weights: Callable[[HFConfig], list[str]] = lambda _: []  # what weights mean that the table cannot express
    moe_layers: Callable[[HFConfig], list[bool]] = lambda config: [False] * config.num_hidden_layers  # with experts
    derived_config: Callable[[HFConfig], dict[str, Any]] = lambda _: {}  # further fields, worked out
    additions: Callable[[HFConfig], Additions] = lambda _: Additions()
    reward_class: str | None = None  # where it is not named after `hf_class`
    engine_head: Literal["any", "embedding", "own"] = "any"  # output layer of vLLM's model of this family

    def class_with_head(self, head: str) -> str:
        """The HF class of a model of this family with a head "lm", or "value" as critics and reward models have it."""
        if head == "lm":
            return self.hf_class
        return self.reward_class or self.hf_class.replace("ForCausalLM", "ForSequenceClassification")

    def is_moe(self, hf: HFConfig) -> bool:
        """Whether any layer of this configuration has experts."""
        return any(self.moe_layers(hf))

    def megatron_fields(self, hf: HFConfig) -> dict[str, Any]:
        """Fields of TransformerConfig for this configuration, but for those that the layout decides."""
        fields = {name: getattr(hf, hf_name) for name, hf_name in self.config_fields.items()} | self.config_constants
        if self.moe_weights:
            sizes = self.dimensions(hf)
            fields |= {
                "num_moe_experts": sizes["experts"],
                "moe_ffn_hidden_size": sizes["expert"],
                "moe_layer_freq": [int(experts) for experts in self.moe_layers(hf)],
                "moe_router_topk": hf.num_experts_per_tok,
                # Softmax over the chosen experts equals softmax over all, then renormalised.
                "moe_router_pre_softmax": not getattr(hf, "norm_topk_prob", True),
            }
            if sizes.get("shared"):
                fields["moe_shared_expert_intermediate_size"] = sizes["shared"]
        return fields | self.derived_config(hf)

    def weight_maps(self, hf: HFConfig, *, tied: bool, head: str) -> Iterator[WeightMap]:
        """Every weight of a model, with layer and expert numbers filled in, in HF order.

        An entry with a dimension of size 0 does not exist in this configuration.

        Args:
            tied: the output layer shares the embedding and has no tensor of its own.
            head: "lm" for vocabulary logits, "value" for one number per token.
        """
        sizes = self.dimensions(hf)
        num_experts = sizes.get("experts", 0)
        yield _EMBEDDING
        for layer, has_experts in enumerate(self.moe_layers(hf)):
            weights = self.layer_weights + (self.moe_weights if has_experts else self.dense_weights)
            present = [w for w in weights if all(sizes[name] for shape in w.shapes for name in shape)]
            for by_expert, group in groupby((w.at("layer", layer) for w in present), key=lambda w: w.expert):
                own = list(group)
                yield from (w.at("expert", e) for e in range(num_experts) for w in own) if by_expert else own
        yield _FINAL_NORM
        if head == "value":
            yield _VALUE_HEAD
        elif not tied:
            yield _LM_HEAD
