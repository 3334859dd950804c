"""Conversion between Hugging Face and Megatron-Core checkpoints, file to file, without a process group.

    cuts               how Megatron-Core cuts a model's weights for a layout
    to_hf              torch_dist -> safetensors
    to_megatron        safetensors -> torch_dist
    steps              what both share: bytes at offsets, digests, memory, the manifest
"""

import megarlhf.parallel  # noqa: F401  (before megatron.core)
