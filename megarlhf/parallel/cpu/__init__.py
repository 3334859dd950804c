"""Megatron-Core without CUDA and without TransformerEngine: plain PyTorch layers over packed tokens.

megatron_cpu       makes the unmodified wheel importable and runs it over gloo
segments           what each run of packed tokens may look at; attention, ring: attention over them
layers             RMSNorm, rotary positions and latent attention that Megatron-Core's own cannot do here
"""
