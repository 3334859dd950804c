"""The Megatron engine: build, forward-backward, optimizer, checkpoint."""

import megarlhf.parallel  # noqa: F401  (before megatron.core)
