"""Tests of whole runs: real Ray, Megatron-Core and vLLM."""

import megarlhf.cluster  # noqa: F401  (first: Ray reads when it is imported what this sets in the environment)
