#!/bin/bash
# A launcher of the demo's task for test_ppo_job.py: two pipeline stages, and an engine that has devices of its own. One
# stage on each of NNODES nodes.
set -euo pipefail
exec "$PYTHON" -m megarlhf.cli.train_ppo_ray \
    --pretrain "$ASSETS/model" --prompt_data "$ASSETS/prompts.jsonl" --reward_function examples/demo/reward.py \
    --actor_num_nodes "$NNODES" --actor_num_gpus_per_node $((2 / NNODES)) --pipeline-model-parallel-size 2 \
    --no-colocate_all_models --vllm_num_engines 1 --vllm_kv_cache_gib 0.25 \
    --advantage_estimator group_norm --init_kl_coef 0.01 --rollout_batch_size 16 --n_samples_per_prompt 4 \
    --prompt_max_len 16 --generate_max_len 8 --global-batch-size 32 --micro-batch-size 16 --train-iters "$STEPS" \
    --actor_learning_rate 1e-3 --reward_num_workers 1 --save "$SAVE" "$@"
