"""The maths of RLHF on plain tensors: KL, advantages, losses. Knows nothing of ranks, models or configuration."""
