"""Megatron-Core without CUDA and without TransformerEngine: plain PyTorch layers over packed tokens.

    megatron_cpu       makes the unmodified wheel importable and runs it over gloo
    segments           what each run of packed tokens may look at; attention, ring: attention over them
    rotary, norm, latent    position embeddings, RMSNorm and latent attention that Megatron-Core's own cannot do here
"""
