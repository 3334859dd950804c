"""What the OpenRLHF 0.5 flags mean here: the one table of other spellings.

A flag that a configuration has under its own name never reaches this table. An entry whose fields a configuration lacks
counts as unknown there.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Alias:
    """One flag of OpenRLHF: renamed, a switch for some settings, accepted without effect, or refused."""

    fields: tuple[str, ...] = ()  # our fields, each takes one of the flag's values
    replace: dict[str, str] = field(default_factory=dict)  # values that are spelled differently here
    settings: dict[str, str] = field(default_factory=dict)  # our field -> value that the bare flag sets
    num_ignored_values: int = 0  # values the flag carries where it is accepted without effect
    note: str = ""  # said once when the flag is used
    refused: str = ""  # why it cannot be used, and what to set instead


ALWAYS = "always so here, the flag has no effect"
LORA = "LoRA is not offered in this version: all weights are trained"
MIXTURE = "mixing data sets is not offered in this version: write one file and give it as"
REWARD_MODEL = "reward models are not offered yet: use --reward_function or --reward_rule"
REFERENCE = "the reference model lives inside the actor's processes: set --actor_num_nodes, --actor_num_gpus_per_node"
WANDB_ENTITY = "set the environment variable that wandb reads: "

ALIASES: dict[str, Alias] = {
    # Run directory
    "save_path": Alias(
        fields=("save",),
        note="it is the run directory here: the trained model comes to hf/, checkpoints to checkpoints/",
    ),
    "ckpt_path": Alias(refused="checkpoints lie in <save>/checkpoints: set --save"),
    "load_checkpoint": Alias(refused="name the run directory to continue from: --load DIR, often the same as --save"),
    "save_steps": Alias(fields=("save_interval",), replace={"-1": "None"}),
    "eval_steps": Alias(fields=("eval_interval",), replace={"-1": "None"}),
    "logging_steps": Alias(fields=("log_interval",)),
    "max_ckpt_mem": Alias(refused="checkpoints are limited by number: set --max_ckpt_num"),
    "save_hf_ckpt": Alias(refused="the Hugging Face checkpoint is written once, at the end, to <save>/hf"),
    "disable_ds_ckpt": Alias(refused="set --save_interval; without it only the last step is saved"),
    "save_value_network": Alias(refused="exporting the critic is not offered in this version"),
    "wandb_org": Alias(refused=WANDB_ENTITY + "WANDB_ENTITY"),
    "wandb_group": Alias(refused=WANDB_ENTITY + "WANDB_RUN_GROUP"),
    # Batches and optimizer
    "train_batch_size": Alias(fields=("global_batch_size",)),
    "micro_train_batch_size": Alias(fields=("micro_batch_size",)),
    "micro_rollout_batch_size": Alias(num_ignored_values=1, note="vLLM batches by itself (--max_num_seqs); no effect"),
    "num_episodes": Alias(refused="set --train_iters to num_episodes * number of prompts / rollout_batch_size"),
    "max_len": Alias(refused="set --prompt_max_len and --generate_max_len"),
    "max_norm": Alias(fields=("clip_grad",)),
    "l2": Alias(fields=("weight_decay",)),
    "adam_betas": Alias(fields=("adam_beta1", "adam_beta2")),
    "lr_scheduler": Alias(refused="set --lr_decay_style cosine (OpenRLHF's cosine_with_min_lr) or constant"),
    "grad_accum_dtype": Alias(refused="gradients are always accumulated in fp32"),
    # Memory and layout
    "gradient_checkpointing": Alias(
        settings={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": "1"}
    ),
    "gradient_checkpointing_use_reentrant": Alias(note="Megatron-Core recomputes in its own way; no effect"),
    "ring_attn_size": Alias(fields=("context_parallel_size",)),
    "ring_head_stride": Alias(refused="context parallelism has no head stride here: leave it out"),
    "zero_stage": Alias(
        refused="ZeRO is DeepSpeed's; here --use_distributed_optimizer splits optimizer state (on by default) and "
        "--tensor_model_parallel_size and --pipeline_model_parallel_size split the weights"
    ),
    "zpg": Alias(refused="ZeRO++ is DeepSpeed's: set --tensor_model_parallel_size or --pipeline_model_parallel_size"),
    "overlap_comm": Alias(refused="it is an option of DeepSpeed: leave it out"),
    "disable_trace_cache": Alias(refused="it is an option of DeepSpeed's ZeRO-3: leave it out"),
    "adam_offload": Alias(
        refused="not offered in this version: --use_distributed_optimizer splits the optimizer state"
    ),
    "flash_attn": Alias(refused="choosing an attention kernel is not offered in this version: leave it out"),
    "packing_samples": Alias(note=ALWAYS),
    "local_rank": Alias(refused="ranks come from the launcher: leave it out"),
    "actor_init_on_gpu": Alias(refused="weights are always loaded where they are used: leave it out"),
    "colocate_actor_ref": Alias(note=ALWAYS),
    "colocate_critic_reward": Alias(refused="set --colocate_all_models or --no_colocate_all_models"),
    "ref_num_nodes": Alias(refused=REFERENCE),
    "ref_num_gpus_per_node": Alias(refused=REFERENCE),
    "ref_reward_offload": Alias(refused=REFERENCE),
    "vllm_enable_sleep": Alias(note=ALWAYS + " where models share devices"),
    "vllm_sync_backend": Alias(refused="the transport of the weights is chosen by the devices: leave it out"),
    "vllm_sync_with_ray": Alias(refused="the transport of the weights is chosen by the devices: leave it out"),
    "enable_prefix_caching": Alias(refused="prefix caching is vLLM's default and is reset at each sync: leave it out"),
    "perf": Alias(note="times are always measured; no effect"),
    # Models
    "load_in_4bit": Alias(refused="4-bit weights are not offered in this version"),
    "lora_rank": Alias(refused=LORA),
    "lora_alpha": Alias(refused=LORA),
    "lora_dropout": Alias(refused=LORA),
    "target_modules": Alias(refused=LORA),
    "value_head_prefix": Alias(
        refused="the critic's value head is named score, as Transformers names it: leave it out"
    ),
    "num_layers_per_virtual_pipeline_stage": Alias(
        refused="set --num_virtual_stages_per_pipeline_rank, the layers of a pipeline rank divided by this number"
    ),
    "virtual_pipeline_model_parallel_size": Alias(fields=("num_virtual_stages_per_pipeline_rank",)),
    "fp8_format": Alias(refused="FP8 is not offered in this version: set --bf16"),
    "fp8": Alias(refused="FP8 is not offered in this version: set --bf16"),
    "aux_loss_coef": Alias(fields=("moe_aux_loss_coeff",)),
    "disable_fast_tokenizer": Alias(refused="the checkpoint's own tokenizer class is used: leave it out"),
    "enable_ema": Alias(refused="averaged weights are not offered in this version"),
    # Rewards, algorithm, data
    "reward_pretrain": Alias(refused=REWARD_MODEL),
    "remote_rm_url": Alias(refused=REWARD_MODEL),
    "reward_num_nodes": Alias(refused=REWARD_MODEL),
    "reward_num_gpus_per_node": Alias(refused=REWARD_MODEL),
    "use_kl_estimator_k3": Alias(settings={"kl_estimator": "k3"}),
    "ptx_coef": Alias(refused="mixing in the pretraining loss is not offered in this version"),
    "pretrain_data": Alias(refused="mixing in the pretraining loss is not offered in this version"),
    "pretrain_data_probs": Alias(refused="mixing in the pretraining loss is not offered in this version"),
    "pretrain_split": Alias(refused="mixing in the pretraining loss is not offered in this version"),
    "prompt_data_probs": Alias(refused=f"{MIXTURE} --prompt_data"),
    "prompt_split": Alias(refused="give the file of the split itself as --prompt_data"),
    "dataset_probs": Alias(refused=f"{MIXTURE} --dataset"),
    "train_split": Alias(refused="give the file of the split itself as --dataset"),
    "eval_split": Alias(refused="give the file of the split itself as --eval_dataset"),
}

# Flags that take a value in OpenRLHF and are switches here. Messages do not repeat the value, for it may be a key.
SWITCH_HINTS: dict[str, str] = {
    "use_wandb": "the key is read from the environment variable WANDB_API_KEY, out of other users' sight",
    "use_tensorboard": "the files go to <save>/tensorboard",
}
