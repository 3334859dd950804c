"""What the ranks of one model would be in a world of any size, without starting one: groups, and weights handed out."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from megarlhf.engine.sending import blocks_to_send
from megarlhf.engine.sharing import pieces_of
from megarlhf.formats.huggingface import HFConfig
from megarlhf.formats.shared_memory import Block, Piece
from megarlhf.models.arch import ArchSpec
from megarlhf.models.build import Head, ModelOptions, build_model
from megarlhf.models.weights import ModelWeights
from megarlhf.parallel.groups import ParallelSizes, Ranks, fake_world, world_groups, world_ranks


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """All ranks of one model."""

    groups: dict[str, list[tuple[int, ...]]]  # ranks of every group, by Megatron-Core's name of its kind
    ranks: list[Ranks]
    exported: list[list[Piece]]  # by rank: what it writes of the weights, or shares with engines on its host
    sent: list[list[Block]]  # by rank: what it sends to engines elsewhere
    shapes: dict[str, tuple[int, ...]]  # of every Hugging Face tensor


def rehearse_model(
    arch: ArchSpec, hf: HFConfig, sizes: ParallelSizes, options: ModelOptions, *, head: Head, world_size: int
) -> Rehearsal:
    """Megatron-Core's groups, and the weights of a model that is built once for each stage and part of the experts.

    Raises:
        ValueError: the world is not a multiple of the groups' sizes.
        RuntimeError: groups of a kind are not a partition of the ranks, or weights are not handed out exactly once.
    """
    groups = world_groups(sizes, world_size=world_size)
    for kind, members in groups.items():
        check_partition(kind, members, world_size)
    ranks = world_ranks(groups, sizes)
    models: dict[tuple[int, int], ModelWeights] = {}
    exported, sent = [], []
    for own in ranks:
        part = own.pp_rank, own.ep_rank
        if part not in models:
            with fake_world(sizes, rank=own.world_rank, world_size=world_size) as found:
                chunks, _ = build_model(arch, hf, found, options, head=head, seed=0)
                models[part] = ModelWeights(chunks, arch, hf, found, head=head)
        weights = models[part]
        weights.ranks = own  # tensor-parallel ranks and replicas have as many numbers, of other places
        exported.append([piece for local in weights.owned_weights() for piece in pieces_of(weights, local)])
        sent.append([block for _, block in blocks_to_send(weights)])
    shapes = next(iter(models.values())).hf_shapes
    check_coverage(shapes, exported)
    check_coverage(shapes, [[piece for block in blocks for piece in block.pieces] for blocks in sent])
    return Rehearsal(groups=groups, ranks=ranks, exported=exported, sent=sent, shapes=shapes)


def check_partition(kind: str, groups: Sequence[Sequence[int]], world_size: int) -> None:
    """Raises RuntimeError where not every rank is in exactly one group; embeddings' groups leave middle stages out."""
    members = sorted(rank for group in groups for rank in group)
    is_partition = members == list(range(world_size))
    if not is_partition and not ("EMBEDDING" in kind and len(set(members)) == len(members)):
        raise RuntimeError(f"{kind}: {len(members)} places in its groups for {world_size} ranks")


def check_coverage(shapes: Mapping[str, tuple[int, ...]], sent: Sequence[Sequence[Piece]]) -> None:
    """Raises RuntimeError where a number of a tensor is handed out by no rank, or twice."""
    boxes: dict[str, list[tuple[slice, ...]]] = defaultdict(list)
    for pieces in sent:
        for piece in pieces:
            boxes[piece.name].append(piece.index)
    for name, shape in shapes.items():
        found = sum(math.prod(part.stop - part.start for part in box) for box in boxes[name])
        twice = any(_overlap(first, second) for first, second in combinations(boxes[name], 2))
        if found != math.prod(shape) or twice:
            raise RuntimeError(f"{name}: {found} of {math.prod(shape)} numbers are handed out, in {boxes[name]}")
    if unknown := boxes.keys() - shapes.keys():
        raise RuntimeError(f"{sorted(unknown)}: handed out, and not the model's")


def _overlap(first: Sequence[slice], second: Sequence[slice]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(first, second, strict=True))
