"""How large a model is in a layout, as records: counted by models/sizes.py, turned into bytes by planner/memory.py."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChunkSizes:
    """One rank's part of a chunk of layers: a pipeline stage, or one of its virtual stages."""

    dense: tuple[int, ...]  # numbers in each parameter that is no expert's
    experts: tuple[int, ...]  # in each parameter of this rank's experts
    buffers: int  # numbers that are not trained, float32
    dense_layers: int
    moe_layers: int
    frozen: int = 0  # numbers in weights that adapters stand beside; `dense` and `experts` are then the adapters'
    four_bit: tuple[int, ...] = ()  # in each of the matrices that are frozen in 4 bits, which `frozen` leaves out


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """Numbers that a layer keeps of one token for its backward pass, with attention that keeps no scores.

    What each of norms, matrices, attention and the gated product saves: its input, and for attention its output too.
    """

    hidden: int
    whole: int  # between the matrices: cut over tensor-parallel ranks by sequence parallelism alone
    attention: int  # cut over tensor-parallel ranks, as all below
    dense: int  # feed-forward part of a dense layer
    shared: int  # of shared experts
    experts_per_token: int  # 0 for a dense model
    expert: int  # inside one routed expert, cut over expert-tensor-parallel ranks
