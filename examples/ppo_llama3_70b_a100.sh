#!/usr/bin/env bash
# PPO on Llama-3-70B-Instruct with a critic as large, two nodes of eight A100-80GBs, BF16. AdamW's state is on the hosts,
# which need 1.4 TiB each, and 1.9 TiB while a checkpoint is written.
#
# A starting point by arithmetic (docs/memory.md has its bytes by phase): it has not been run on such nodes.
#
#     MODEL=/models/Llama-3-70B-Instruct PROMPT_DATA=/data/math.jsonl examples/ppo_llama3_70b_a100.sh --ray_address HOST:PORT
set -euo pipefail

export SAVE=${SAVE:-runs/ppo_llama3_70b_a100}
export NNODES=${NNODES:-2}
export TP_SIZE=${TP_SIZE:-8}
export PP_SIZE=${PP_SIZE:-2}
export VLLM_TP_SIZE=${VLLM_TP_SIZE:-8}
export VLLM_SHARE=${VLLM_SHARE:-0.6}
export GENERATE_MAX_LEN=${GENERATE_MAX_LEN:-1024}
export MAX_TOKENS_PER_MICRO_BATCH=${MAX_TOKENS_PER_MICRO_BATCH:-4096}

exec "$(dirname "$0")/ppo_llama3_8b_h100.sh" \
    --optimizer_cpu_offload --overlap_cpu_optimizer_d2h_h2d \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    "$@"
