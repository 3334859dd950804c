#!/usr/bin/env bash
# PPO on Llama-2-7B-chat with a critic as large, four cards of 24 GB in one machine, BF16. AdamW's state is on the host,
# which needs 270 GiB, and 360 GiB while a checkpoint is written.
#
# A starting point by arithmetic (docs/memory.md has its bytes by phase): it has not been run on such cards.
#
#     MODEL=/models/Llama-2-7b-chat-hf PROMPT_DATA=/data/math.jsonl examples/ppo_llama2_7b_24gb.sh
set -euo pipefail

export SAVE=${SAVE:-runs/ppo_llama2_7b_24gb}
export GPUS_PER_NODE=${GPUS_PER_NODE:-4}
export TP_SIZE=${TP_SIZE:-4}
export VLLM_TP_SIZE=${VLLM_TP_SIZE:-2}
export VLLM_SHARE=${VLLM_SHARE:-0.6}
export GENERATE_MAX_LEN=${GENERATE_MAX_LEN:-1024}
export MAX_TOKENS_PER_MICRO_BATCH=${MAX_TOKENS_PER_MICRO_BATCH:-4096}
export PROMPTS=${PROMPTS:-64}
export GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-64}

exec "$(dirname "$0")/ppo_llama3_8b_h100.sh" \
    --optimizer_cpu_offload --overlap_cpu_optimizer_d2h_h2d \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    "$@"
