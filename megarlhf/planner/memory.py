"""Bytes that one rank of a model takes on its device, by part: arithmetic alone.

What is kept between steps is what Megatron-Core 0.16.1 allocates (param_and_grad_buffer.py, distrib_optimizer.py,
optimizer.py); what a pass keeps of its tokens follows Korthikanti et al., arXiv:2205.05198, for gated feed-forward
parts, without dropout, and attention that keeps no scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megarlhf.data.model_sizes import ChunkSizes, LayerWidths

_ALIGNMENT = 64  # a parameter starts at a multiple of so many numbers in the distributed optimizer's buffer
_BUCKET = 128  # and a bucket ends at one of these and of the ranks that share it
_OFFLOADED = 16  # bytes on the host of a number that is stepped there: main weight, gradient and two moments, float32


@dataclass(frozen=True, kw_only=True)
class Work:
    """How one model is trained."""

    bf16: bool
    tensor: int
    pipeline: int
    virtual: int
    expert_tensor: int
    sequence_parallel: bool
    replicas: int  # ranks with the same dense weights: data x context
    expert_replicas: int
    distributed_optimizer: bool
    recompute: Literal["full", "selective"] | None
    recompute_method: Literal["uniform", "block"] | None
    recompute_num_layers: int | None
    tokens: int  # of one micro-batch on one rank, at most
    micro_batches: int  # of an optimizer step on one rank, at most
    vocabulary: int  # padded; 0 for a value head
    logprob_chunk_tokens: int  # tokens whose logits exist at a time
    has_reference: bool
    offload_fraction: float = 0.0  # of the optimizer, on the host

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """One rank of a training role."""

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    forward: int  # activations of a pass without gradients
    backward: int  # of forward and backward passes
    logits: int  # on the last stage, in either pass
    teacher: int = 0  # weights of another model, there while it computes
    teacher_output: int = 0  # those of its output layer, which stay, on the last stage
    gathered: int = 0  # optimizer state on the device while it is collected for a checkpoint
    host_optimizer: int = 0  # what is stepped on the host, there
    host_gathered: int = 0  # on the host while a checkpoint is written
    weight_buckets: int = 0  # of weights that are sent or gathered in a sync


def buffer_numbers(parameters: Sequence[int], *, replicas: int, distributed_optimizer: bool) -> int:
    """Numbers in Megatron-Core's buffer of these parameters' gradients, padding of one bucket included.

    With overlap_grad_reduce, or a tied embedding on another stage, there are more buckets, each padded by less than
    128 numbers, or than the ranks that share it.
    """
    if not distributed_optimizer:
        return sum(parameters)
    aligned = sum(-(-number // _ALIGNMENT) * _ALIGNMENT for number in parameters)
    multiple = math.lcm(replicas, _BUCKET)
    return -(-aligned // multiple) * multiple


def optimizer_bytes(numbers: int, *, bf16: bool, replicas: int, distributed_optimizer: bool) -> int:
    """AdamW's two moments, and float32 main weights beside bfloat16 ones.

    Float32 parameters are stepped in place: with the distributed optimizer main weights are views of them.

    Args:
        numbers: of a rank's buffer.
        replicas: ranks that the distributed optimizer splits it over.
    """
    own = numbers // replicas if distributed_optimizer else numbers
    return own * (12 if bf16 else 8)


def offloaded_numbers(numbers: Sequence[int], own: int, fraction: float) -> int:
    """Of a rank's `own` numbers those that are stepped on the host, at most.

    Megatron-Core takes parameter after parameter until the fraction is reached (hybrid_optimizer.py).
    """
    return min(own, math.ceil(fraction * own) + (max(numbers, default=0) if fraction < 1 else 0)) if fraction else 0


def gathered_bytes(
    numbers: Sequence[int], held: int, replicas: int, *, offloaded: bool, collects: bool
) -> tuple[int, int]:
    """On the device and on the host, while a checkpoint is made of a distributed optimizer's state.

    Every rank gathers the whole of a buffer, one of main weights and two moments at a time on the device, and keeps all
    three on the host, beside its own parts of them and two copies of one (distrib_optimizer.py,
    get_parameter_state_dp_zero). What is stepped on the host is gathered there, by one replica; and where there is one,
    nothing is gathered.

    Args:
        collects: the rank is of the first replica.
    """
    own = held // replicas
    if replicas == 1:
        return 0, 12 * sum(numbers)
    whole = 12 * sum(numbers) + 8 * held
    return (0, 12 * own + whole * collects) if offloaded else (4 * (held + own), 12 * own + whole)


def rank_bytes(
    stages: Sequence[Sequence[ChunkSizes]],
    widths: LayerWidths,
    work: Work,
    *,
    stage: int,
    collects: tuple[bool, bool] = (True, True),
) -> RankBytes:
    """A rank of a pipeline stage.

    Args:
        stages: every stage's chunks.
        collects: whether it is of the first replica of the dense weights, and of the experts.
    """
    parameters = gradients = optimizer = reference = on_host = 0
    gathered = [(0, 0)]
    for chunk in stages[stage]:
        kinds = zip((chunk.dense, chunk.experts), (work.replicas, work.expert_replicas), collects, strict=True)
        for numbers, replicas, is_first in kinds:
            held = buffer_numbers(numbers, replicas=replicas, distributed_optimizer=work.distributed_optimizer)
            parameters += held * work.element
            gradients += held * 4
            whole = optimizer_bytes(
                held, bf16=work.bf16, replicas=replicas, distributed_optimizer=work.distributed_optimizer
            )
            optimizer += math.ceil((1 - work.offload_fraction) * whole)
            if work.distributed_optimizer:
                on_host += _OFFLOADED * offloaded_numbers(numbers, held // replicas, work.offload_fraction)
                offloaded = work.offload_fraction > 0
                gathered.append(gathered_bytes(numbers, held, replicas, offloaded=offloaded, collects=is_first))
            reference += sum(numbers) * work.element if work.has_reference else 0
        parameters += chunk.buffers * 4 + chunk.frozen * work.element + sum(chunk.four_bit) * 9 // 16
    last = stage == len(stages) - 1
    forward = max(_stored(chunk, widths, work, forward_only=True) for chunk in stages[stage])
    per_chunk = max(_stored(chunk, widths, work, forward_only=False) for chunk in stages[stage])
    working = max(_recomputed(chunk, widths, work) for chunk in stages[stage])
    backward = per_chunk * chunks_in_flight(work, stage) + working
    ends = _last_hidden(widths, work) if last else 0
    ends += max((n for chunk in stages[stage] for n in chunk.four_bit), default=0) * work.element  # as it multiplies
    return RankBytes(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        forward=forward + ends,
        backward=backward + ends,
        logits=logits_bytes(work) if last else 0,
        gathered=max(device for device, _ in gathered),
        host_optimizer=on_host,
        host_gathered=parameters + sum(host for _, host in gathered),
    )


def chunks_in_flight(work: Work, stage: int) -> int:
    """Forward passes of a chunk that a stage has begun and not yet taken back, at most.

    1F1B: one for each stage from this one on. Interleaved: Megatron-Core's warm-up of 2 * (p - 1 - stage) + (v - 1) * p
    (schedules.py, get_pp_rank_microbatches) and the one after it; on the first stage L * (1 + (p - 1) / (p * v))
    layers.
    """
    p, v = work.pipeline, work.virtual
    begun = p - stage if v == 1 else 2 * (p - 1 - stage) + (v - 1) * p + 1
    return min(begun, work.micro_batches * v)


def layer_bytes(widths: LayerWidths, work: Work, *, experts: bool) -> int:
    """What a layer keeps of a micro-batch for its backward pass; experts are taken to be evenly chosen.

    For Llama 70B about 34 * hidden bytes a token, over tensor-parallel ranks with sequence parallelism, in bfloat16.
    """
    t, e = work.tensor, work.element
    per_token = widths.whole / (t if work.sequence_parallel else 1) + widths.attention / t
    if experts:
        # A rank's tokens, one part of the t parts, go to experts and come back; expert-tensor ranks see each other's.
        chosen = widths.experts_per_token / t
        per_token += widths.shared / t + chosen * (2 * widths.hidden * work.expert_tensor + widths.expert)
    else:
        per_token += widths.dense / t
    return math.ceil(work.tokens * per_token * e)


def logits_bytes(work: Work) -> int:
    """One chunk of [tokens, vocabulary / tp] in float32, and under bf16 the product that it comes from."""
    if not work.vocabulary:
        return 0
    each = 4 if work.element == 4 else 4 + work.element
    return min(work.logprob_chunk_tokens, work.tokens) * (work.vocabulary // work.tensor) * each


def _stored(chunk: ChunkSizes, widths: LayerWidths, work: Work, *, forward_only: bool) -> int:
    """What one pass of a chunk leaves behind; without gradients, what its largest layer needs meanwhile."""
    dense, experts = (layer_bytes(widths, work, experts=kind) for kind in (False, True))
    if forward_only:
        return max(dense if chunk.dense_layers else 0, experts if chunk.moe_layers else 0)
    layers = chunk.dense_layers + chunk.moe_layers
    everything = chunk.dense_layers * dense + chunk.moe_layers * experts
    if work.recompute != "full" or not layers:
        return everything
    num = work.recompute_num_layers or 1
    if work.recompute_method == "block":
        return num * _layer_input(widths, work) + everything * max(0, layers - num) // layers
    return -(-layers // num) * _layer_input(widths, work)


def _recomputed(chunk: ChunkSizes, widths: LayerWidths, work: Work) -> int:
    """Of the layers that the backward pass computes again at a time."""
    if work.recompute != "full":
        return 0
    at_a_time = (work.recompute_num_layers or 1) if work.recompute_method == "uniform" else 1
    return at_a_time * _stored(chunk, widths, work, forward_only=True)


def _layer_input(widths: LayerWidths, work: Work) -> int:
    return work.tokens * widths.hidden * work.element // (work.tensor if work.sequence_parallel else 1)


def _last_hidden(widths: LayerWidths, work: Work) -> int:
    """Before the output layer: the final norm's input and output, the latter gathered over sequence-parallel ranks."""
    return _layer_input(widths, work) + work.tokens * widths.hidden * work.element
