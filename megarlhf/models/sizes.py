"""How many numbers a rank holds of a model in a layout, and how many a layer keeps of each token, from tables alone."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.data.model_sizes import ChunkSizes, LayerWidths
from megarlhf.formats.huggingface import EMBEDDING, HFConfig
from megarlhf.models.arch import ArchSpec, Split, WeightMap
from megarlhf.models.names import is_tied, model_maps, padded_vocab_size
from megarlhf.models.targets import adaptable, adapter_numbers, is_quantised, is_target

_MASK = 0.5  # numbers that a byte of a dropout mask takes, beside bfloat16


def stage_sizes(
    arch: ArchSpec, hf: HFConfig, layout: LayoutArguments, *, head: str, lora: LoraArguments | None = None
) -> list[list[ChunkSizes]]:
    """Each pipeline stage's chunks, in order; all tensor-parallel ranks of a stage hold as much.

    Args:
        hf: as read_checkpoint gives it; the model's sizes are divisible as cut_model asks.
        head: "lm" or "value".
        lora: adapters that are trained in the place of the weights; None, or of rank 0: none.
    """
    pp, virtual = layout.pipeline_model_parallel_size, layout.virtual_stages
    by_layer: dict[int | None, list[WeightMap]] = defaultdict(list)
    for weight in model_maps(arch, hf, head):
        by_layer[weight.layer_number].append(weight)
    depths = stage_depths(hf.num_hidden_layers, layout)
    stages: list[list[ChunkSizes]] = [[] for _ in range(pp)]
    first_layer = 0
    for number in range(virtual):  # Megatron-Core deals chunks over the stages in turn
        for stage, depth in enumerate(depths):
            layers = range(first_layer, first_layer + depth // virtual)
            first_layer = layers.stop
            weights = [weight for layer in layers for weight in by_layer[layer]]
            first, last = (stage, number) == (0, 0), (stage, number) == (pp - 1, virtual - 1)
            weights += [w for w in by_layer[None] if (first if w.hf == (EMBEDDING,) else last)]
            if last and not first and is_tied(hf, head):
                weights += [w for w in by_layer[None] if w.hf == (EMBEDDING,)]  # the output layer's copy
            stages[stage].append(
                _chunk(arch, hf, layout, weights, arch.moe_layers(hf)[layers.start : layers.stop], lora)
            )
    return stages


def stage_depths(num_layers: int, layout: LayoutArguments) -> list[int]:
    """Layers of each pipeline stage, as Megatron-Core deals them (transformer_block.py, get_num_layers_to_build)."""
    pp = layout.pipeline_model_parallel_size
    ends = {0: layout.decoder_first_pipeline_num_layers, pp - 1: layout.decoder_last_pipeline_num_layers}
    given = {stage: depth for stage, depth in ends.items() if depth is not None}
    others = pp - len(given)
    depth = (num_layers - sum(given.values())) // others if others else 0
    return [given.get(stage, depth) for stage in range(pp)]


def layer_widths(arch: ArchSpec, hf: HFConfig, *, lora: LoraArguments | None = None) -> LayerWidths:
    """Of an architecture's layers, from its dimensions; see stage_sizes."""
    sizes, hidden = arch.dimensions(hf), int(hf.hidden_size)
    # two norms, and what they give to the matrices behind them; norms after these
    whole = (6 if arch.additions(hf).norms_after else 4) * hidden
    if latent := sizes.get("kv_latent", 0):  # queries, keys and values come up from latents, of which norms are taken
        whole += 2 * sizes["q_latent"] + sizes["kv_latent_rope"] + latent
        attention = 2 * sizes["q"] + 2 * sizes["values"]
    else:
        attention = 2 * sizes["q"] + 2 * sizes["kv"]
        if arch.config_constants.get("qk_layernorm"):
            attention += sizes["q"] + sizes["kv"]
    widths = LayerWidths(
        hidden=hidden,
        whole=whole,
        attention=attention,
        dense=3 * sizes["ffn"],
        shared=3 * sizes.get("shared", 0),
        experts_per_token=hf.num_experts_per_tok if arch.is_moe(hf) else 0,
        expert=3 * sizes.get("expert", 0),
    )
    return widths if lora is None or not lora.lora_rank else _with_adapters(widths, arch, sizes, lora)


def _with_adapters(widths: LayerWidths, arch: ArchSpec, sizes: dict[str, int], lora: LoraArguments) -> LayerWidths:
    """Frozen matrices keep nothing; an adapter keeps its input, or with dropout what is left of it and the mask.

    An input that several matrices share is kept once. What attention keeps of itself, and a copy of a token's hidden
    state for each of its experts, stay as they are.
    """
    fields = {"hidden": "whole", "q_latent": "whole", "kv_latent": "whole", "ffn": "dense", "shared": "shared"}
    change, shared = Counter[str](), dict[tuple[str, str, bool], bool]()
    for weight in (*arch.layer_weights, *arch.dense_weights, *arch.moe_weights):
        for module, (outputs, inputs) in adaptable(weight.at("layer", 0)).items():
            if not sizes[outputs] or not sizes[inputs]:
                continue
            field = "expert" if weight.expert else fields.get(inputs, "attention")
            adapted = is_target(module, lora)
            if field != "attention" and (field, inputs) != ("expert", "hidden"):
                key = field, inputs, weight in arch.layer_weights
                shared[key] = shared.get(key, False) or (adapted and not lora.lora_dropout)
            if adapted:
                dropped = (1 + _MASK) * sizes[inputs] if lora.lora_dropout else 0
                change[field] += lora.lora_rank + math.ceil(dropped)
    for (field, inputs, _), kept in shared.items():
        change[field] -= 0 if kept else sizes[inputs]
    return replace(widths, **{field: getattr(widths, field) + number for field, number in change.items()})


def kv_numbers_per_token(arch: ArchSpec, hf: HFConfig, *, tensor: int) -> int:
    """Numbers in the KV cache of one token on one of `tensor` ranks of an inference engine, over all layers.

    A rank holds at least one KV head; what latent attention keeps is whole on each.
    """
    sizes = arch.dimensions(hf)
    latent = sizes["kv_latent_rope"] if sizes.get("kv_latent") else 0
    return int(hf.num_hidden_layers) * (latent or 2 * (sizes["kv"] // min(tensor, hf.num_key_value_heads)))


def engine_sizes(arch: ArchSpec, hf: HFConfig, *, tensor: int) -> tuple[int, int]:
    """Numbers in the weights of one of `tensor` ranks of an inference engine, and in its largest module.

    The experts of a layer are one module; KV heads are copied where there are fewer than ranks. Vocabulary padding is
    the trainer's, which differs from an engine's by less than 128 rows.
    """
    layout = LayoutArguments(tensor_model_parallel_size=tensor)
    ((chunk,),) = stage_sizes(arch, hf, layout, head="lm")
    copies = max(0, tensor - hf.num_key_value_heads) if "kv_latent" not in arch.dimensions(hf) else 0
    head = arch.dimensions(hf)["kv"] // hf.num_key_value_heads * hf.hidden_size
    experts = sum(chunk.experts)
    whole = sum(chunk.dense) + experts + 2 * hf.num_hidden_layers * head * copies // tensor
    return whole, max(*chunk.dense, experts // max(1, chunk.moe_layers))


def _chunk(
    arch: ArchSpec,
    hf: HFConfig,
    layout: LayoutArguments,
    weights: Sequence[WeightMap],
    has_experts: Sequence[bool],
    lora: LoraArguments | None,
) -> ChunkSizes:
    tp = layout.tensor_model_parallel_size
    sizes = arch.dimensions(hf) | {"vocab": padded_vocab_size(hf.vocab_size, tp)}
    mine = sizes.get("experts", 0) // layout.expert_model_parallel_size

    def local(weight: WeightMap) -> int:
        whole = sum(math.prod(sizes[name] for name in shape) for shape in weight.shapes)
        parts = (layout.expert_tensor_parallel_size or tp) if weight.expert else tp
        return whole if weight.split is Split.REPLICATED else whole // parts

    dense = [w for w in weights if not w.expert and not w.buffer]
    experts = [w for w in weights if w.expert_number is not None and w.expert_number < mine]
    frozen, four_bit, trained = 0, tuple[int, ...](), lambda weight: [local(weight)]
    if lora is not None and lora.lora_rank:
        four_bit = tuple(local(w) for w in (*dense, *experts) if lora.load_in_4bit and is_quantised(w))
        frozen = sum(local(w) for w in (*dense, *experts) if w.hf != ("score.weight",)) - sum(four_bit)

        def trained(weight: WeightMap) -> list[int]:
            parts = (layout.expert_tensor_parallel_size or tp) if weight.expert else tp
            own = [local(weight)] if weight.hf == ("score.weight",) else []
            return own + adapter_numbers(weight, lora, sizes, parts=parts)

    return ChunkSizes(
        dense=tuple(number for weight in dense for number in trained(weight)),
        experts=tuple(number for weight in experts for number in trained(weight)),
        frozen=frozen,
        four_bit=four_bit,
        buffers=sum(local(w) for w in weights if w.buffer),
        dense_layers=has_experts.count(False),
        moe_layers=has_experts.count(True),
    )
