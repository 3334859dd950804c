"""How large the object store must be through which a step's tokens go from engines to training ranks."""

from megarlhf.config.arguments import PPOConfig

# int32 ids and log-probs from the engines; log-probs, KL and values on their way to the driver, advantages and returns
# back: all float32
_BYTES_PER_RESPONSE_TOKEN = 24
_SPARE = 1.25  # of the whole: objects are aligned, and those of the step before go late
_LEAST = 128 << 20


def object_store_bytes(config: PPOConfig) -> int:
    """Bytes of one node's store, for steps whose prompts and responses are as long as they may be."""
    prompts = config.batch.rollout_batch_size
    responses = prompts * config.batch.n_samples_per_prompt * config.rollout.generate_max_len
    tokens = _BYTES_PER_RESPONSE_TOKEN * responses + 4 * prompts * config.rollout.prompt_max_len
    return max(_LEAST, int(_SPARE * tokens))
