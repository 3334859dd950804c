"""What vLLM needs of the process that an engine is in, and where a CPU asks for other options."""

from collections.abc import Mapping
from typing import Any

_CPU_BLOCK_TOKENS = 32  # the prefix cache shares whole blocks: vLLM's 128 on a CPU is longer than most prompts


def engine_environment(*, threads: int, tensor_parallel_size: int = 1) -> dict[str, str]:
    """Variables that an engine's process needs from its start on.

    Args:
        threads: CPU threads of the whole engine, shared out over its tensor-parallel ranks.
    """
    if threads < tensor_parallel_size:
        raise ValueError(
            f"threads={threads} is less than tensor_parallel_size={tensor_parallel_size} (each rank computes with "
            "threads of its own): set a tensor_parallel_size of at most the engine's cores"
        )
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler runs in our process: a tiny model loads in 2 s, not 20
        "OMP_NUM_THREADS": str(threads // tensor_parallel_size),  # Ray and vLLM would make it 1
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared with the trainer, whose phases alternate with ours
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # huge pages: an update packs hundreds of MB into new memory
        "MALLOC_ARENA_MAX": "1",  # in one heap, whichever thread packs
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),  # which stays with us for the next update
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    }


def platform_options(passed: Mapping[str, Any], quantization: str | None, kv_cache_gib: float) -> dict[str, Any]:
    """vLLM's options that are others on a CPU, beside those that were passed.

    Args:
        quantization: "fp8_per_tensor" or "fp8_per_block"; on a CPU, which has no such kernels, weights are rounded.
        kv_cache_gib: KV cache on a CPU, in GiB a rank.
    """
    from vllm.platforms import current_platform

    from megarlhf.rollout import weight_transfer

    if not current_platform.is_cpu():
        return dict(passed) | ({} if quantization is None else {"quantization": quantization})
    options = {
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "block_size": _CPU_BLOCK_TOKENS,
        # vLLM takes a seeded request's generator back a step where its prompt was cut, which a CPU's cannot.
        "enable_chunked_prefill": False,
    } | dict(passed)
    if quantization is not None:
        options["additional_config"] = (options.get("additional_config") or {}) | {weight_transfer.ROUNDS: quantization}
    return options
