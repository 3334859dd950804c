#!/usr/bin/env bash
# GRPO on Qwen3-30B-A3B, two nodes of eight H100s, BF16: 128 experts over eight ranks, matrices between them over two.
#
# A starting point by arithmetic: it has not been run on such nodes.
#
#     MODEL=/models/Qwen3-30B-A3B PROMPT_DATA=/data/math.jsonl examples/grpo_qwen3_30b_a3b_h100.sh --ray_address HOST:PORT
set -euo pipefail

export SAVE=${SAVE:-runs/grpo_qwen3_30b_a3b_h100}
export NNODES=${NNODES:-2}
export TP_SIZE=${TP_SIZE:-2}
export VLLM_TP_SIZE=${VLLM_TP_SIZE:-2}
export ESTIMATOR=${ESTIMATOR:-group_norm}
export SAMPLES_PER_PROMPT=${SAMPLES_PER_PROMPT:-8}
export MAX_TOKENS_PER_MICRO_BATCH=${MAX_TOKENS_PER_MICRO_BATCH:-8192}

exec "$(dirname "$0")/ppo_llama3_8b_h100.sh" \
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    "$@"
