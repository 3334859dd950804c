"""HF weights into a rank's Megatron parameters, and out again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megarlhf.data.tensor_file import TensorFile, TensorSpec
from megarlhf.models.arch import ArchSpec, Split, WeightMap
from megarlhf.models.build import Head, head_dim
from megarlhf.models.hf_files import HFConfig, HFWeights
from megarlhf.models.shards import AttentionShape, Shard, shards_of
from megarlhf.parallel.groups import Ranks

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BoundWeight:
    """A local Megatron parameter with its entry in the table."""

    name: str  # Megatron's name with the global layer number
    param: torch.nn.Parameter
    weight: WeightMap
    exported: bool  # False for the last stage's copy of a tied embedding


class ModelWeights:
    """The weights of one model as this rank holds them, with HF names.

    Raises:
        ValueError: a Megatron parameter that the table does not know.
    """

    def __init__(self, model: torch.nn.Module, arch: ArchSpec, hf: HFConfig, ranks: Ranks, *, head: Head) -> None:
        self.arch, self.hf, self.ranks, self.head = arch, hf, ranks, head
        self.tied = bool(hf.tie_word_embeddings) and head == "lm"
        self._maps = list(arch.weight_maps(hf.num_hidden_layers, tied=self.tied, head=head))
        self._attention = AttentionShape(
            num_heads=hf.num_attention_heads, num_groups=hf.num_key_value_heads, head_dim=head_dim(hf)
        )
        self.bound = self._bind(model)

    def _bind(self, model: torch.nn.Module) -> list[BoundWeight]:
        by_name = {name: weight for weight in self._maps for name in weight.megatron}
        embedding = by_name["embedding.word_embeddings.weight"]
        bound, unknown = [], []
        for name, param in model.named_parameters():
            name = _global_name(model, name)
            if self.tied and name == "output_layer.weight":
                bound.append(BoundWeight(name=name, param=param, weight=embedding, exported=False))
            elif name in by_name:
                bound.append(BoundWeight(name=name, param=param, weight=by_name[name], exported=True))
            else:
                unknown.append(name)
        if unknown:
            raise ValueError(f"{self.arch.hf_class}: Megatron parameters without an entry in the table: {unknown}")
        for entry in bound:
            _mark_parallel(entry)
        return bound

    def _shards(self, bound: BoundWeight, data: Tensor) -> list[Shard]:
        return shards_of(
            bound.weight,
            data,
            attention=self._attention,
            vocab_size=self.hf.vocab_size,
            tp_rank=self.ranks.tp_rank,
            tp_size=self.ranks.tp_size,
        )

    def hf_names(self) -> list[str]:
        """Every HF tensor of the whole model, in the order that keeps q, k, v and gate, up adjacent."""
        return [name for weight in self._maps for name in weight.hf]

    @torch.no_grad()
    def load(self, source: HFWeights) -> None:
        """Fill this rank's parameters, reading only its own slices.

        A value head without a tensor in the source keeps its drawn weights: a critic may start from a causal LM.

        Raises:
            ValueError: missing, unknown or wrongly shaped tensors, all of them named.
        """
        self._check_names(source)
        for bound in self.bound:
            data = bound.param.data
            if bound.weight.split is Split.VOCAB:
                data.zero_()
            for shard in self._shards(bound, data):
                if shard.hf_name == "score.weight" and shard.hf_name not in source.names():
                    continue
                if shard.view.numel():
                    shard.store(source.read(shard.hf_name, shard.index))

    def _check_names(self, source: HFWeights) -> None:
        expected, present = set(self.hf_names()), set(source.names())
        missing = expected - present - ({"score.weight"} if self.head == "value" else set())
        spare = {"lm_head.weight"} if self.tied or self.head == "value" else set()
        spare |= {"score.weight"} if self.head == "lm" else set()
        unknown = {n for n in present - expected - spare if not n.endswith("rotary_emb.inv_freq")}
        problems = [f"missing {sorted(missing)}"] if missing else []
        problems += [f"unknown {sorted(unknown)}"] if unknown else []
        for name, shape in self.hf_shapes().items():
            if name in present and source.shape(name) != shape:
                problems.append(f"{name} has shape {source.shape(name)}, the configuration says {shape}")
        if problems:
            raise ValueError(
                f"pretrain={source.directory}; weights do not fit {self.arch.hf_class}: " + "; ".join(problems)
            )

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every HF tensor, from the configuration alone."""
        hf, a = self.hf, self._attention
        hidden, q, kv = hf.hidden_size, a.num_heads * a.head_dim, a.num_groups * a.head_dim
        ends: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (hf.vocab_size, hidden),
            "lm_head.weight": (hf.vocab_size, hidden),
            "score.weight": (1, hidden),
            "q_proj.weight": (q, hidden),
            "k_proj.weight": (kv, hidden),
            "v_proj.weight": (kv, hidden),
            "q_proj.bias": (q,),
            "k_proj.bias": (kv,),
            "v_proj.bias": (kv,),
            "o_proj.weight": (hidden, q),
            "gate_proj.weight": (hf.intermediate_size, hidden),
            "up_proj.weight": (hf.intermediate_size, hidden),
            "down_proj.weight": (hidden, hf.intermediate_size),
            "q_norm.weight": (a.head_dim,),
            "k_norm.weight": (a.head_dim,),
            "layernorm.weight": (hidden,),
            "norm.weight": (hidden,),
        }
        return {n: next(shape for end, shape in ends.items() if n.endswith(end)) for n in self.hf_names()}

    def tensor_specs(self, dtype: torch.dtype) -> list[TensorSpec]:
        """Layout of a whole HF weight file in one dtype."""
        return [TensorSpec(name, shape, dtype) for name, shape in self.hf_shapes().items()]

    @torch.no_grad()
    def write(self, file: TensorFile) -> None:
        """Write what this rank holds into a weight file that all ranks have open.

        Data-parallel replicas share the work: each writes every dp_size-th weight. The caller puts a barrier behind.
        """
        mine = [bound for bound in self.bound if bound.exported]
        for bound in mine[self.ranks.dp_rank :: self.ranks.dp_size]:
            if bound.weight.split is Split.REPLICATED and self.ranks.tp_rank:
                continue
            for shard in self._shards(bound, bound.param.data):
                if shard.view.numel():
                    shard.emit(file.view(shard.hf_name))

    @torch.no_grad()
    def iter_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole HF tensors one after another, equal on every rank; every rank must iterate to the end.

        For transports that take a stream of tensors. Gathers over tensor parallelism, then broadcasts from the
        pipeline stage that owns the weight.
        """
        from megatron.core import parallel_state as mpu

        dtype = self.bound[0].param.dtype
        device = self.bound[0].param.device
        by_hf = {bound.weight.hf: bound for bound in self.bound if bound.exported}
        shapes = self.hf_shapes()
        for weight in self._maps:
            bound = by_hf.get(weight.hf)
            shards = self._shards(bound, bound.param.data) if bound is not None else []
            for position, name in enumerate(weight.hf):
                whole = torch.zeros(shapes[name], dtype=dtype, device=device)
                owner = bound is not None and (weight.split is not Split.REPLICATED or self.ranks.tp_rank == 0)
                if owner and shards[position].view.numel():
                    shards[position].emit(whole)
                # Parts do not overlap, so the sum of bytes over the model's ranks is the whole tensor, bit for bit.
                dist.all_reduce(whole.view(torch.uint8), group=mpu.get_model_parallel_group())
                yield name, whole


def _mark_parallel(bound: BoundWeight) -> None:
    """Say which parameters are cut over tensor parallelism.

    Megatron-Core says so only while it initialises weights itself, which the engine skips; the gradient norm counts an
    unmarked parameter on one rank alone.
    """
    if bound.weight.split is not Split.REPLICATED:
        dimension = 1 if bound.weight.split is Split.ROW else 0
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(bound.param, name):
                delattr(bound.param, name)
        set_tensor_model_parallel_attributes(bound.param, True, dimension, 1)


def _global_name(model: Any, name: str) -> str:
    """Megatron's parameter name with the layer's number in the whole model instead of in this stage."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def source_dtype(source: HFWeights) -> torch.dtype:
    """The dtype that the checkpoint is stored in; exports keep it.

    Raises:
        ValueError: a dtype that weights are not trained from.
    """
    found = {source.dtype(name) for name in source.names()}
    if len(found) != 1 or not found <= set(_DTYPES):
        raise ValueError(
            f"pretrain={source.directory}; tensor dtypes {sorted(found)}: one of {sorted(_DTYPES)} for all"
        )
    return _DTYPES[found.pop()]
