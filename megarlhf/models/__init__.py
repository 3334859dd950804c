"""Architectures: one table each, HF <-> Megatron weights, heads."""

import megarlhf.parallel  # noqa: F401  (before megatron.core)
