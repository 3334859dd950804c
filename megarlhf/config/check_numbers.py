"""Numbers of a configuration against their ranges, each other and the sizes in the models' config.json.

Every function returns sentences for the user and raises nothing; a value that is out of its own range is reported once,
by `limit_errors`, and passed over by the rest.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megarlhf.config.algorithm_arguments import AlgorithmArguments
from megarlhf.config.arguments import AveragedOptimizerArguments, BatchArguments, PPOConfig
from megarlhf.config.check_layout import broken, one_of, size
from megarlhf.config.lora import LoraArguments
from megarlhf.config.pretraining_arguments import PretrainingArguments
from megarlhf.formats.data_names import probability_errors

Models = Mapping[str, Mapping[str, Any]]  # option that names a checkpoint -> its config.json

KL_STEP_LIMIT = 0.2  # algos/kl.py's MAX_RELATIVE_ERROR, without importing torch
GROUP_ESTIMATORS = ("reinforce_baseline", "rloo", "group_norm", "dr_grpo")

_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda v: v >= 1,
        "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size recompute_num_layers "
        "expert_model_parallel_size expert_tensor_parallel_size num_virtual_stages_per_pipeline_rank "
        "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers critic_tensor_model_parallel_size "
        "critic_pipeline_model_parallel_size critic_context_parallel_size critic_expert_model_parallel_size "
        "critic_expert_tensor_parallel_size critic_num_virtual_stages_per_pipeline_rank "
        "critic_decoder_first_pipeline_num_layers critic_decoder_last_pipeline_num_layers "
        "reward_tensor_model_parallel_size reward_pipeline_model_parallel_size reward_context_parallel_size "
        "reward_expert_model_parallel_size reward_expert_tensor_parallel_size "
        "reward_num_virtual_stages_per_pipeline_rank reward_decoder_first_pipeline_num_layers "
        "reward_decoder_last_pipeline_num_layers reward_num_nodes reward_num_gpus_per_node "
        "actor_num_nodes actor_num_gpus_per_node critic_num_nodes critic_num_gpus_per_node num_gpus_per_node "
        "vllm_num_engines vllm_tensor_parallel_size tis_cap train_iters num_episodes rollout_batch_size "
        "dynamic_filtering_max_rounds overlong_buffer_len update_weight_buffer_mib "
        "n_samples_per_prompt global_batch_size micro_batch_size max_tokens_per_micro_batch logprob_chunk_tokens "
        "max_epochs max_len eval_iters prompt_max_len generate_max_len max_num_seqs num_groups max_samples kl_horizon "
        "save_interval eval_interval log_interval max_ckpt_num max_untrained_steps reward_num_workers "
        "max_batch_tokens max_queries max_waiting_queries max_body_mib "
        "fp8_amax_history_len "
        "reward_chunk_size remote_rm_batch_size remote_rm_concurrency teacher_top_k lora_alpha num_rounds",
    ),
    ("at least 3", lambda v: v >= 3, "longest"),
    (
        "above 0",
        lambda v: v > 0,
        "tolerance distributed_timeout_minutes start_timeout_seconds phase_timeout_seconds reward_timeout_seconds "
        "reward_memory_gib "
        "remote_rm_timeout_seconds ptx_coef overlong_penalty_factor "
        "adam_eps value_clip beta kl_target temperature eval_temperature vllm_kv_cache_gib gpu_memory_gib "
        "fp8_max_amax logprob_diff_budget logprob_kl_budget max_ckpt_mem repetition_penalty host_memory_gib",
    ),
    (
        "0 or more",
        lambda v: v >= 0,
        "seed actor_learning_rate critic_learning_rate learning_rate weight_decay clip_grad init_kl_coef entropy_coef "
        "moe_aux_loss_coeff nll_loss_coef desirable_loss_weight undesirable_loss_weight lora_rank "
        "fp8_fallback_steps num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 "
        "remote_rm_max_retries eval_n_samples_per_prompt iter max_restarts",
    ),
    (
        "from 0 to 1",
        lambda v: 0 <= v <= 1,
        "fp8_max_saturated gamma lambd kd_coef ema_decay lr_warmup_ratio min_lr_ratio min_result_fraction "
        "max_no_result_fraction",
    ),
    ("from 0 to below 0.5", lambda v: 0 <= v < 0.5, "label_smoothing"),
    ("from 0 to below 1", lambda v: 0 <= v < 1, "min_p adam_beta1 adam_beta2 lora_dropout"),
    ("above 0 and below 1", lambda v: 0 < v < 1, "eps_clip eps_clip_high"),
    ("above 0 and at most 1", lambda v: 0 < v <= 1, "vllm_gpu_memory_utilization top_p optimizer_offload_fraction"),
    ("above 1", lambda v: v > 1, "dual_clip"),
    ("-1 or more", lambda v: v >= -1, "top_k freezing_actor_steps"),
    ("from 0 to 65535", lambda v: 0 <= v <= 65535, "port"),
)
LIMITS = {name: (range_text, holds) for range_text, holds, names in _RANGES for name in names.split()}


def limit_errors(options: Mapping[str, Any]) -> list[str]:
    """Options, by name, outside their own range; None is in every range."""
    return [
        f"{name}={options[name]} must be {range_text}"
        for name, (range_text, holds) in LIMITS.items()
        if (value := options.get(name)) is not None
        and not all(map(holds, value if isinstance(value, tuple) else (value,)))
    ]


def engine_errors(engine_tp: int, model: Mapping[str, Any]) -> list[str]:
    """vLLM splits query heads evenly; KV heads are split, or copied where there are fewer than ranks."""
    heads = size(model, "num_attention_heads")
    if heads is None:
        return []
    kv_heads = size(model, "num_key_value_heads", heads) or heads
    valid = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if engine_tp < 1 or engine_tp in valid:
        return []
    return [
        f"vllm_tensor_parallel_size={engine_tp} does not divide num_attention_heads={heads} and "
        f"num_key_value_heads={kv_heads} of pretrain (heads are split over it): use {one_of(valid)}"
    ]


def batch_errors(batch: BatchArguments, context_parallel_size: int) -> list[str]:
    """A step that does not divide into optimizer steps, and prompts that cannot be shared."""
    size, shared, each = batch.global_batch_size, batch.share_prompt_prefix, batch.n_samples_per_prompt
    samples = batch.rollout_batch_size * each
    if samples < 1 or size < 1:
        return []
    errors = broken(
        {
            f"global_batch_size={size} does not divide rollout_batch_size={batch.rollout_batch_size} x "
            f"n_samples_per_prompt={each} = {samples} (optimizer steps are all of one size): use {samples} or a "
            "divisor of it": samples % size,
            f"share_prompt_prefix=True needs global_batch_size={size} to be a multiple of n_samples_per_prompt={each} "
            "(a prompt's samples stay together): change one of them": shared and size % each,
        }
    )
    return errors + (shared_prefix_errors(context_parallel_size) if shared else [])


def shared_prefix_errors(context_parallel_size: int) -> list[str]:
    """A prompt that its samples share lies on every rank whole."""
    said = f"share_prompt_prefix=True does not work with context_parallel_size={context_parallel_size}: use 1"
    return [said] if context_parallel_size != 1 else []


def algorithm_errors(algorithm: AlgorithmArguments, batch: BatchArguments, freezing_actor_steps: int) -> list[str]:
    """Options of the objective that contradict each other or would be without effect."""
    estimator, (low, high) = algorithm.advantage_estimator, algorithm.reward_clip_range
    target, kl_coef, kl_loss = algorithm.kl_target, algorithm.init_kl_coef, algorithm.use_kl_loss
    samples = batch.rollout_batch_size * batch.n_samples_per_prompt
    frozen, steps = freezing_actor_steps, batch.train_iters
    return broken(
        {
            f"kl_horizon={algorithm.kl_horizon} with {samples} samples a step (one step could take the KL coefficient "
            f"to 0): set kl_horizon above {samples * KL_STEP_LIMIT:g}": (
                target is not None and samples * KL_STEP_LIMIT >= algorithm.kl_horizon >= 1
            ),
            f"kl_target={target} needs init_kl_coef above 0 "
            "(the adaptive weight is a multiple of it): set init_kl_coef": kl_coef == 0 and target is not None,
            "use_kl_loss=True needs init_kl_coef above 0 (0 leaves the KL out): set init_kl_coef": (
                kl_coef == 0 and kl_loss
            ),
            f"kl_target={target} with use_kl_loss=True (the adaptive weight is that of the KL in the reward): leave "
            "one of them out": target is not None and kl_loss,
            "kl_estimator=k1 with use_kl_loss=True (the gradient of k1 is 0 on average, so the loss would not hold the "
            "policy near the reference): use k2 or k3": kl_loss and algorithm.kl_estimator == "k1",
            f"n_samples_per_prompt=1 with advantage_estimator={estimator} (it compares the samples of one prompt, a "
            "single one teaches nothing): use 2 or more": (
                estimator in GROUP_ESTIMATORS and batch.n_samples_per_prompt == 1
            ),
            f"freezing_actor_steps={frozen} with advantage_estimator={estimator} (without a critic those steps would "
            "train nothing): leave it out": frozen > 0 and estimator != "gae",
            f"freezing_actor_steps={frozen} leaves none of train_iters={steps} steps to train the actor: use fewer": (
                estimator == "gae" and steps is not None and frozen > 0 and frozen >= steps >= 1
            ),
            f"loss_aggregation={algorithm.loss_aggregation} is ignored with advantage_estimator=dr_grpo (its "
            "denominator is generate_max_len): leave it out": (
                estimator == "dr_grpo" and algorithm.loss_aggregation != "token"
            ),
            f"critic_loss_aggregation={algorithm.critic_loss_aggregation} is ignored with "
            f"advantage_estimator={estimator} (only gae trains a critic): leave it out": (
                estimator != "gae" and algorithm.critic_loss_aggregation != "token"
            ),
            f"reward_clip_range={low} {high} must be the lowest reward and then a higher one": not low < high,
        }
    )


def filter_errors(config: PPOConfig) -> list[str]:
    """Options of filters that are off, and limits that no response or group can meet."""
    algorithm, default, longest = config.algorithm, AlgorithmArguments(), config.rollout.generate_max_len
    buffer, band = algorithm.overlong_buffer_len, algorithm.dynamic_filtering_reward_range
    owners = dict.fromkeys(("dynamic_filtering_reward_range", "dynamic_filtering_max_rounds"), "dynamic_filtering")
    owners |= {"overlong_penalty_factor": "overlong_buffer_len"}
    ignored = {
        f"{name}={getattr(algorithm, name)} is ignored without {owner}: set it, or leave {name} out": (
            getattr(algorithm, name) != getattr(default, name) and not getattr(algorithm, owner)
        )
        for name, owner in owners.items()
    }
    return broken(
        ignored
        | {
            f"overlong_buffer_len={buffer} is above generate_max_len={longest} (it is the last part of that): use at "
            f"most {longest}": buffer is not None and buffer > longest,
            "dynamic_filtering=True with n_samples_per_prompt=1 (it compares the samples of one prompt): use 2 or "
            "more, or leave it out": algorithm.dynamic_filtering and config.batch.n_samples_per_prompt == 1,
            f"dynamic_filtering_reward_range={band} must be the lowest mean and then a higher one": (
                band is not None and not band[0] < band[1]
            ),
        }
    )


def average_errors(optimizer: AveragedOptimizerArguments) -> list[str]:
    """A decay of no average."""
    decay = optimizer.ema_decay
    ignored = decay != AveragedOptimizerArguments.ema_decay and not optimizer.enable_ema
    return broken({f"ema_decay={decay} is ignored with enable_ema=False: set it, or leave ema_decay out": ignored})


def value_network_errors(config: PPOConfig) -> list[str]:
    """A critic to be exported that there is not."""
    estimator = config.algorithm.advantage_estimator
    said = f"save_value_network=True with advantage_estimator={estimator} (only gae trains a critic): leave it out"
    return broken({said: config.model.save_value_network and estimator != "gae"})


def pretraining_errors(pretraining: PretrainingArguments) -> list[str]:
    """Options of the pretraining loss without its data, and numbers of data sets that do not fit."""
    own = vars(pretraining)
    if pretraining.pretrain_data is not None:
        return probability_errors(
            "pretrain_data_probs", pretraining.pretrain_data_probs, "pretrain_data", pretraining.pretrain_data
        )
    return broken(
        {
            f"{name}={value} is ignored without pretrain_data (there is nothing to pre-train on): set it, or leave "
            f"{name} out": value != getattr(PretrainingArguments, name)
            for name, value in own.items()
        }
    )


def correction_errors(config: PPOConfig) -> list[str]:
    """Bounds of the weights of what vLLM sampled."""
    algorithm, band = config.algorithm, config.algorithm.tis_mask_range
    low, high = band or (0.5, 5.0)
    cap, mask = f"tis_cap={algorithm.tis_cap}", f"tis_mask_range={low} {high}"
    given = {cap: algorithm.tis_cap != AlgorithmArguments.tis_cap, mask: band is not None}
    why = f"use_tis={algorithm.use_tis} and bf16={config.model.bf16}"
    return broken(
        {
            f"{option} is ignored with {why}: set use_tis, or leave it out": is_given and not config.uses_tis
            for option, is_given in given.items()
        }
        | {
            f"{cap} is ignored with {mask}: leave one of them out": config.uses_tis and all(given.values()),
            f"{mask} must be a bound from 0 to below 1 and one above 1 (where trainer and vLLM agree the weight is 1): "
            "use 0.5 5": not 0 <= low < 1 < high,
        }
    )


def adapter_errors(lora: LoraArguments) -> list[str]:
    """Options of adapters where there are none."""
    default = LoraArguments()
    return [
        f"{name}={value} is ignored with lora_rank=0 (all weights are trained): set lora_rank, or leave it out"
        for name, value in vars(lora).items()
        if not lora.lora_rank and value != getattr(default, name)
    ]


def length_errors(name: str, length: int, max_tokens: int | None, models: Models) -> list[str]:
    """The longest sequence, whose tokens the options `name` make, against the models' positions and the micro-batch."""
    errors = []
    for owner, model in models.items():
        limit = size(model, "max_position_embeddings")
        if limit is not None and length > limit:
            errors.append(f"{name} = {length} is above max_position_embeddings={limit} of {owner}: use at most {limit}")
    if max_tokens is not None and 0 < max_tokens < length:
        errors.append(
            f"max_tokens_per_micro_batch={max_tokens} is below {name} = {length} (a sequence of full length must fit): "
            f"use at least {length}"
        )
    return errors


def sampling_errors(config: PPOConfig) -> list[str]:
    """Sampling from another distribution than the trainer computes, or from one that takes too much memory."""
    rollout = config.rollout
    given = [f"{name}={getattr(rollout, name)}" for name in ("top_p", "min_p")]
    return broken(
        {
            f"repetition_penalty={rollout.repetition_penalty} is not offered (the trainer's log-probabilities are "
            "without it, which biases the policy ratio): use 1.0": rollout.repetition_penalty != 1,
            f"{' and '.join(given)} need top_k unless a step is one update without a KL (the tokens that are kept at "
            "each place are stored for the passes that follow, and top_k bounds them): set top_k, such as 64": (
                rollout.is_truncated and rollout.top_k <= 0 and not config.is_one_pass
            ),
        }
    )
