"""What the OpenRLHF 0.5 flags mean here: the one table of other spellings.

A flag that a configuration has under its own name never reaches this table. An entry that needs a field which a
configuration lacks counts as unknown there.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Alias:
    """One flag of OpenRLHF: renamed, a switch for some settings, accepted without effect, or refused."""

    fields: tuple[str, ...] = ()  # our fields, each takes one of the flag's values
    replace: dict[str, str] = field(default_factory=dict)  # values that are spelled differently here
    settings: dict[str, str] = field(default_factory=dict)  # our field -> value that the bare flag sets
    choices: dict[str, dict[str, str]] = field(default_factory=dict)  # value -> what it sets
    num_ignored_values: int = 0  # values the flag carries where it is accepted without effect
    note: str = ""  # said once when the flag is used
    refused: str = ""  # why it cannot be used, and what to set instead
    only_with: str = ""  # a field that the programs have to which OpenRLHF gives a flag without a field of its own

    @property
    def needs(self) -> set[str]:
        """The fields that a configuration has to which this is a flag."""
        sets = {*self.fields, *self.settings, *(name for chosen in self.choices.values() for name in chosen)}
        return sets | {*self.only_with.split()}


ALWAYS = "always so here, the flag has no effect"

ALIASES: dict[str, Alias] = {
    # Run directory
    "save_path": Alias(
        fields=("save",),
        note="it is the run directory here: the trained model comes to hf/, checkpoints to checkpoints/",
    ),
    "save_steps": Alias(fields=("save_interval",), replace={"-1": "None"}),
    "eval_steps": Alias(fields=("eval_interval",), replace={"-1": "None"}),
    "logging_steps": Alias(fields=("log_interval",)),
    # Prompts and responses
    "output_path": Alias(fields=("output",)),
    "dataset": Alias(fields=("prompt_data",)),
    "dataset_probs": Alias(fields=("prompt_data_probs",)),
    "dataset_split": Alias(fields=("prompt_split",)),
    "max_new_tokens": Alias(fields=("generate_max_len",)),
    "best_of_n": Alias(fields=("n_samples_per_prompt",)),
    "greedy_sampling": Alias(settings={"greedy": "True"}),
    "tp_size": Alias(fields=("vllm_tensor_parallel_size",)),
    # Batches and optimizer
    "train_batch_size": Alias(fields=("global_batch_size",)),
    "micro_train_batch_size": Alias(fields=("micro_batch_size",)),
    "micro_rollout_batch_size": Alias(
        num_ignored_values=1, note="vLLM batches by itself (--max_num_seqs); no effect", only_with="max_num_seqs"
    ),
    "batch_size": Alias(
        num_ignored_values=1, note="queries are packed, up to --max_batch_tokens; no effect", only_with="max_queries"
    ),
    "max_norm": Alias(fields=("clip_grad",)),
    "l2": Alias(fields=("weight_decay",)),
    "adam_betas": Alias(fields=("adam_beta1", "adam_beta2")),
    "lr_scheduler": Alias(
        choices={
            "cosine_with_min_lr": {"lr_decay_style": "cosine"},
            "cosine": {"lr_decay_style": "cosine", "min_lr_ratio": "0"},
            "linear": {"lr_decay_style": "linear", "min_lr_ratio": "0"},
            "constant": {"lr_decay_style": "constant", "lr_warmup_ratio": "0"},
            "constant_with_warmup": {"lr_decay_style": "constant"},
            "inverse_sqrt": {"lr_decay_style": "inverse-square-root", "min_lr_ratio": "0"},
        }
    ),
    # Memory and layout
    "gradient_checkpointing": Alias(
        settings={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": "1"}
    ),
    "gradient_checkpointing_use_reentrant": Alias(note="Megatron-Core recomputes in its own way; no effect"),
    "ring_attn_size": Alias(fields=("context_parallel_size",)),
    "ring_head_stride": Alias(num_ignored_values=1, note="rings here pass all heads at once; no effect"),
    "zero_stage": Alias(
        num_ignored_values=1,
        note="ZeRO is DeepSpeed's; here --use_distributed_optimizer splits the optimizer's state (on by default), "
        "--tensor_model_parallel_size and --pipeline_model_parallel_size split weights and gradients",
    ),
    "adam_offload": Alias(settings={"optimizer_cpu_offload": "True"}),
    "use_precision_aware_optimizer": Alias(
        note="always so with --optimizer_cpu_offload; main weights, moments and gradients are float32 in any case",
        only_with="optimizer_cpu_offload",
    ),
    "zpg": Alias(
        choices={"1": {}},
        note="ZeRO++ is DeepSpeed's; --tensor_model_parallel_size and --pipeline_model_parallel_size split weights",
    ),
    "disable_trace_cache": Alias(note="it is of DeepSpeed's ZeRO-3; no effect"),
    "grad_accum_dtype": Alias(choices={"fp32": {}}, note="gradients are always accumulated in fp32"),
    "flash_attn": Alias(note="attention is fused wherever a kernel for it is installed, with or without this flag"),
    "local_rank": Alias(num_ignored_values=1, note="ranks come from the launcher's environment; no effect"),
    "virtual_pipeline_model_parallel_size": Alias(fields=("num_virtual_stages_per_pipeline_rank",)),
    "packing_samples": Alias(note=ALWAYS),
    "colocate_actor_ref": Alias(note=ALWAYS, only_with="actor_num_nodes"),
    "colocate_critic_reward": Alias(
        note="all models, and the engines too, take turns on the same devices here, unless --no_colocate_all_models "
        "gives actor, critic, each reward model and engines their own; no effect",
        only_with="actor_num_nodes",
    ),
    **dict.fromkeys(
        ("ref_num_nodes", "ref_num_gpus_per_node"),
        Alias(
            num_ignored_values=1,
            note="the reference is in the actor's processes, of which --actor_num_nodes and --actor_num_gpus_per_node "
            "are the number; no effect",
            only_with="actor_num_nodes",
        ),
    ),
    "actor_init_on_gpu": Alias(note="weights are loaded where they are used; no effect", only_with="actor_num_nodes"),
    "vllm_sync_backend": Alias(
        num_ignored_values=1,
        note="--weight_transport, or else the devices, decide how weights reach vLLM; no effect",
        only_with="actor_num_nodes",
    ),
    "vllm_sync_with_ray": Alias(
        note="--weight_transport, or else the devices, decide how weights reach vLLM; no effect",
        only_with="actor_num_nodes",
    ),
    "enable_prefix_caching": Alias(note=ALWAYS + "; each sync empties the cache", only_with="max_num_seqs"),
    "teacher_offload": Alias(note=ALWAYS, only_with="teacher_model"),
    "vllm_enable_sleep": Alias(note=ALWAYS + " where models share devices", only_with="actor_num_nodes"),
    "perf": Alias(note="times are always measured; no effect", only_with="actor_num_nodes"),
    # Model and algorithm
    "seq_length": Alias(fields=("max_len",)),
    "value_head_prefix": Alias(
        choices={"score": {}}, note="heads are named score, as Transformers names them", only_with="reward_pretrain"
    ),
    "aux_loss_coef": Alias(fields=("moe_aux_loss_coeff",)),
    "loss": Alias(
        choices={"sigmoid": {}, "logexp": {}},
        note="sigmoid and logexp are one loss, log(1 + exp(margin - difference)), the margin in both; no effect",
        only_with="margin_loss",
    ),
    "compute_fp32_loss": Alias(note=ALWAYS, only_with="margin_loss"),
    "use_kl_estimator_k3": Alias(settings={"kl_estimator": "k3"}),
}

_REFUSED = {  # why, and what to set instead -> flags
    # Run directory
    "the Hugging Face checkpoint is written once, at the end, to <save>/hf": "save_hf_ckpt",
    "set --save_interval; without it only the last step is saved": "disable_ds_ckpt",
    # Batches and optimizer
    "set --prompt_max_len and --generate_max_len": "max_len",
    # Memory and layout
    "it is an option of DeepSpeed: leave it out": "overlap_comm",
    "set --num_virtual_stages_per_pipeline_rank, the layers of a pipeline rank divided by this number": (
        "num_layers_per_virtual_pipeline_stage"
    ),
    # tools/preprocess_data.py
    "documents are stored whole (sentences are for BERT): leave it out": "split_sentences keep_newlines lang",
    "vocabularies of GPT-2 and BERT come as a Hugging Face tokenizer: --tokenizer_type HuggingFaceTokenizer "
    "--tokenizer_model DIR": "vocab_file merge_file vocab_size",
    "the file is read piece by piece and its order is kept: leave it out": "partitions keep_sequential_samples",
    # Models
    "which phases compute in FP8 is said for each: set train_dtype, log_prob_dtype or rollout_dtype": "fp8",
    "Transformers 5 has one tokenizer for each model, the fast one, and vLLM loads the same: leave it out": (
        "disable_fast_tokenizer"
    ),
    "weights are not quantised here: leave it out; megarlhf merge_lora merges a 4-bit run's adapter": "load_in_4bit",
}
ALIASES |= {name: Alias(refused=why) for why, names in _REFUSED.items() for name in names.split()}

# Flags that take a value in OpenRLHF and are switches here -> what is said of the value, which is not repeated: it may
# be a key.
SWITCH_VALUES: dict[str, str] = {
    "use_wandb": "other users of this machine can read a key on a command line: set WANDB_API_KEY instead",
    "use_tensorboard": "the files go to <save>/tensorboard",
}
