"""Options of vLLM and Megatron-Core that are not passed through, each with what depends on it."""

from fnmatch import fnmatchcase

_MODEL = "the checkpoint's config.json says it, and weights are converted by that"
_LAYOUT = "new weights reach an engine by its tensor-parallel parts: set vllm_num_engines, vllm_tensor_parallel_size"
_GROUPS = "process groups, placement and weight conversion are made from this package's own layout options"
_FP8 = "set train_dtype, log_prob_dtype, and the options of FP8 that are this package's own"
_OTHER_MODELS = "it is of a kind of model that is not supported here"

_VLLM = {
    "set pretrain": "model model_weights served_model_name hf_config_path model_impl model_class_overrides "
    "config_format revision code_revision disable_sliding_window",
    "set tokenizer; prompts come as tokens and responses are decoded outside": "tokenizer tokenizer_mode "
    "tokenizer_revision skip_tokenizer_init tokens_only",
    "nothing is downloaded, and code of a checkpoint is not run": "download_dir hf_token trust_remote_code "
    "allowed_local_media_path allowed_media_domains",
    "set rollout_dtype": "dtype",
    "set seed; each response has a seed of its own": "seed",
    "it is prompt_max_len + generate_max_len": "max_model_len",
    "set max_num_seqs": "max_num_seqs",
    "set enforce_eager": "enforce_eager",
    "set vllm_gpu_memory_utilization, or vllm_kv_cache_gib on a CPU": "kv_cache_memory_bytes num_gpu_blocks_override",
    "the trainer compares with the log-probs of the distribution sampled from": "logprobs_mode logits_processors "
    "enable_return_routed_experts return_sampling_mask aux_output_config watermark_config diffusion_config",
    "sampling and stop tokens are this package's": "generation_config override_generation_config reasoning_parser "
    "reasoning_parser_plugin reasoning_config structured_outputs_config",
    "weights come from the trainer, as they are there": "load_format quantization quantization_config "
    "allow_deprecated_quantization weight_transfer_config worker_cls worker_extension_cls hf_overrides "
    "model_loader_extra_config ignore_patterns pt_load_map_location",
    "updates write each weight where it lies": "cpu_offload_* offload_* *eplb* expert_placement_strategy "
    "enable_ep_weight_filter *elastic_ep*",
    "phases decide who sleeps": "enable_sleep_mode sleep_mode_offload_cudagraph sleep_preserve_parameter_names "
    "enable_cumem_allocator",
    "it is on, and reset at each update": "enable_prefix_caching",
    _LAYOUT: "*_parallel_size data_parallel_* enable_expert_parallel distributed_executor_backend nnodes node_rank "
    "master_addr master_port device_ids *fault_tolerance*",
    "vLLM gets adapters merged into the weights": "*lora*",
    "a draft model's weights would stay those of the start": "speculative_config spec_*",
    "an engine here generates text, for this run alone": "runner convert pooler_config kv_transfer_config "
    "ec_transfer_config",
}

_MEGATRON = {
    _GROUPS: "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
    "sequence_parallel context_parallel_size expert_model_parallel_size expert_tensor_parallel_size moe_extended_tp "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout "
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split hybrid_context_parallel "
    "hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank cp_comm_type mtp_standalone "
    "pipeline_model_parallel_comm_backend",
    _MODEL: "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels normalization "
    "layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias gated_linear_unit activation_func "
    "glu_linear_offset activation_func_clamp_value num_moe_experts rotary_interleaved window_size softmax_scale "
    "window_attn_skip_freq qk_layernorm qk_l2_norm multi_latent_attention no_rope_freq attention_output_gate "
    "softmax_type apply_residual_connection_post_layernorm moe_shared_expert_intermediate_size moe_shared_expert_gate "
    "moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_num_groups moe_router_group_topk mrope_section "
    "moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function moe_router_enable_expert_bias "
    "moe_router_topk_limited_devices moe_apply_probs_on_input moe_latent_size moe_router_dtype "
    "apply_query_key_layer_scaling fp32_residual_connection mtp_num_layers mtp_loss_scaling_factor",
    "it follows bf16": "fp16 bf16 params_dtype pipeline_dtype autocast_dtype enable_autocast loss_scale "
    "initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    "weights come from pretrain and are not drawn": "perform_initialization use_cpu_initialization init_method "
    "output_layer_init_method init_method_std embedding_init_method embedding_init_method_std "
    "init_model_with_meta_device",
    "log-probs must be a function of the weights alone": "attention_dropout hidden_dropout moe_input_jitter_eps "
    "moe_token_dropping moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy "
    "moe_router_force_load_balancing moe_enable_routing_replay test_mode qk_clip qk_clip_alpha qk_clip_threshold",
    "seeds and generators are set with the groups": "use_te_rng_tracker inference_rng_tracker inference_sampling_seed",
    "set moe_aux_loss_coeff": "moe_aux_loss_coeff moe_router_load_balancing_type",
    "the loss carries its denominator, and gradients are scaled in one place": "calculate_per_token_loss "
    "moe_z_loss_coeff grad_scale_func finalize_model_grads_func no_sync_func grad_sync_func param_sync_func timers "
    "barrier_with_L1_time",
    "it has another name here: set rope_fusion": "apply_rope_fusion fused_single_qkv_rope",
    "it has another name here: set bias_swiglu_fusion": "bias_activation_fusion use_te_activation_func",
    "it follows transformer_impl": "moe_grouped_gemm moe_use_legacy_grouped_gemm",
    "attention here has no softmax of its own": "masked_softmax_fusion attention_softmax_in_fp32",
    "norms here are RMSNorm": "persist_layer_norm memory_efficient_layer_norm",
    "losses here are computed over log-probs; it rounds gradients to bfloat16": "cross_entropy_loss_fusion "
    "cross_entropy_fusion_impl",
    "lines are packed and sent by the schedule of this package": "variable_seq_lengths overlap_p2p_comm "
    "batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs moe_token_dispatcher_type "
    "overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage moe_shared_expert_overlap "
    "num_microbatches_with_partial_activation_checkpoints overlap_moe_expert_parallel_comm "
    "ep_overlap_early_attn_memory_release delay_wgrad_compute moe_enable_deepep moe_flex_dispatcher_backend "
    "moe_deepep_num_sms moe_hybridep_num_sms",
    "the buffers that it works in are not set up here": "tp_comm_*",
    "routers' biases stay as the checkpoint has them": "moe_router_bias_update_rate",
    _FP8: "fp8* fp4* tp_only_amax_red first_last_layers_bf16 num_layers_at_*_in_bf16 quant_recipe use_kitchen* "
    "kitchen_attention_backend activation_func_fp8_input_store moe_router_padding_for_* reuse_grad_buf_for_mxfp8_*",
    _OTHER_MODELS: "experimental_attention_variant dsa_* linear_* is_hybrid_model mamba_* use_mamba_mem_eff_path "
    "heterogeneous_block_specs hetereogenous_dist_checkpoint",
    "it is of generation, which vLLM does": "flash_decode mlp_chunks_for_prefill use_inference_optimized_layers "
    "inference_fuse_tp_communication",
    "sleeping roles give memory away, and graphs and offloaded tensors keep addresses": "*_graph* cpu_offloading*",
    "Megatron-Core 0.16 steps with PyTorch's AdamW on the host in any case": "use_torch_optimizer_for_cpu_offload",
    "set actor_learning_rate, critic_learning_rate or learning_rate": "lr decoupled_lr decoupled_min_lr",
    "set min_lr_ratio": "min_lr",
    "the optimizer is AdamW, whose state checkpoints hold": "optimizer decoupled_weight_decay sgd_* muon_*",
    "master weights and gradients are float32": "use_precision_aware_optimizer store_param_remainders main_grads_dtype "
    "main_params_dtype exp_avg_dtype exp_avg_sq_dtype",
    "parameters are gathered where overlap_param_gather says": "overlap_param_gather_with_optimizer_step",
    "it writes files beside the run directory": "config_logger_dir",
}

_TABLES = {"vllm": _VLLM, "megatron": _MEGATRON}


def refusal(program: str, name: str) -> str | None:
    """Why an option is not passed on to "vllm" or "megatron"; None where it is."""
    for reason, patterns in _TABLES[program].items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return reason
    return None
