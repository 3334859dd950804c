#!/usr/bin/env bash
# PPO on Llama-3-70B-Instruct with a critic as large, eight nodes of eight H100s, BF16.
#
# A starting point by arithmetic: it has not been run on such nodes.
#
#     MODEL=/models/Llama-3-70B-Instruct PROMPT_DATA=/data/math.jsonl examples/ppo_llama3_70b_h100.sh --ray_address HOST:PORT
set -euo pipefail

export SAVE=${SAVE:-runs/ppo_llama3_70b_h100}
export NNODES=${NNODES:-8}
export TP_SIZE=${TP_SIZE:-8}
export PP_SIZE=${PP_SIZE:-4}
export VLLM_TP_SIZE=${VLLM_TP_SIZE:-8}
export MAX_TOKENS_PER_MICRO_BATCH=${MAX_TOKENS_PER_MICRO_BATCH:-8192}

exec "$(dirname "$0")/ppo_llama3_8b_h100.sh" \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    "$@"
