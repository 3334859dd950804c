"""What attention is told of a packed micro-batch: Megatron-Core's packed parameters, for either implementation."""

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megarlhf.data.types import MicroBatch
from megarlhf.parallel.cpu.segments import SegmentParams, attention_blocks, context_blocks


def packed_params(batch: MicroBatch, *, transformer_impl: str) -> PackedSeqParams:
    """What Megatron-Core's layers of that implementation need to know of a packed micro-batch.

    Raises:
        NotImplementedError: a shared prompt for TransformerEngine, whose attention has no such mask.
    """
    if transformer_impl == "transformer_engine":
        if any(prefix is not None for prefix in batch.prefix_segments):
            raise NotImplementedError("share_prompt_prefix=True: TransformerEngine's attention has no shared prefix")
        longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
        # its context parallelism asserts that the padded lengths are given too; segments have no padding between them
        padded = batch.cu_seqlens if batch.context_size > 1 else None
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    if batch.context_size > 1:
        rank = parallel_state.get_context_parallel_rank()
        blocks = context_blocks(batch.cu_seqlens, rank, batch.context_size)
    else:
        blocks = attention_blocks(batch.cu_seqlens, batch.prefix_segments, batch.position_ids)
    return SegmentParams(qkv_format="sbhd", position_ids=batch.position_ids, blocks=blocks)
