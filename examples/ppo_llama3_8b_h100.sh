#!/usr/bin/env bash
# PPO with a critic on Llama-3-8B-Instruct, one node of eight H100s, BF16: math problems, checked by math-verify. Actor,
# reference, critic and vLLM take turns on the same GPUs.
#
# A starting point by arithmetic (docs/memory.md has its bytes by phase): it has not been run on such a node. The launchers
# of larger models set its variables. More than one node (NNODES) is a Ray cluster's, which --ray_address names.
#
#     MODEL=/models/Llama-3-8B-Instruct PROMPT_DATA=/data/math.jsonl examples/ppo_llama3_8b_h100.sh
#     MODEL=... PROMPT_DATA=... examples/ppo_llama3_8b_h100.sh --dry-run       what would run, and where
set -euo pipefail
cd "$(dirname "$0")/.."

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export HF_HUB_OFFLINE=1

# Where things are. Data: one JSON object a line, {"input": problem or chat messages, "label": answer}.
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:?directory of the Hugging Face checkpoint}
PROMPT_DATA=${PROMPT_DATA:?prompts to train on}
EVAL_DATA=${EVAL_DATA:-}
SAVE=${SAVE:-runs/ppo_llama3_8b_h100}
SEED=${SEED:-42}

# Layout: TP inside the node, the rest is data parallelism (8 GPUs / TP 4 = 2)
NNODES=${NNODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP_SIZE=${TP_SIZE:-4}
PP_SIZE=${PP_SIZE:-1}
CP_SIZE=${CP_SIZE:-1}
VLLM_TP_SIZE=${VLLM_TP_SIZE:-1}
VLLM_ENGINES=${VLLM_ENGINES:-$((NNODES * GPUS_PER_NODE / VLLM_TP_SIZE))}
VLLM_SHARE=${VLLM_SHARE:-0.7}

# Size of a step, length of the run, learning rates
TRAIN_ITERS=${TRAIN_ITERS:-500}
PROMPTS=${PROMPTS:-256}
SAMPLES_PER_PROMPT=${SAMPLES_PER_PROMPT:-4}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
MAX_TOKENS_PER_MICRO_BATCH=${MAX_TOKENS_PER_MICRO_BATCH:-16384}
PROMPT_MAX_LEN=${PROMPT_MAX_LEN:-1024}
GENERATE_MAX_LEN=${GENERATE_MAX_LEN:-2048}
ACTOR_LR=${ACTOR_LR:-1e-6}
CRITIC_LR=${CRITIC_LR:-9e-6}
KL_COEF=${KL_COEF:-0.01}
ESTIMATOR=${ESTIMATOR:-gae}

MODEL_PARALLEL_ARGS=(
    --actor_num_nodes "${NNODES}"
    --actor_num_gpus_per_node "${GPUS_PER_NODE}"
    --tensor-model-parallel-size "${TP_SIZE}"
    --pipeline-model-parallel-size "${PP_SIZE}"
    --context-parallel-size "${CP_SIZE}"
    --use-distributed-optimizer
)
if [ "${TP_SIZE}" -gt 1 ]; then
    MODEL_PARALLEL_ARGS+=(--sequence-parallel)
fi

DATA_ARGS=(
    --pretrain "${MODEL}"
    --prompt_data "${PROMPT_DATA}"
    --apply_chat_template
    --reward_rule math
)

ROLLOUT_ARGS=(
    --colocate_all_models
    --vllm_num_engines "${VLLM_ENGINES}"
    --vllm_tensor_parallel_size "${VLLM_TP_SIZE}"
    --vllm_gpu_memory_utilization "${VLLM_SHARE}"
    --no-enforce_eager
    --rollout_batch_size "${PROMPTS}"
    --n_samples_per_prompt "${SAMPLES_PER_PROMPT}"
    --prompt_max_len "${PROMPT_MAX_LEN}"
    --generate_max_len "${GENERATE_MAX_LEN}"
    --temperature 1.0
)

PPO_ARGS=(
    --advantage_estimator "${ESTIMATOR}"
    --gamma 1.0
    --lambd 0.95
    --eps_clip 0.2
    --value_clip 0.2
    --init_kl_coef "${KL_COEF}"
)

TRAINING_ARGS=(
    --bf16
    --train-iters "${TRAIN_ITERS}"
    --global-batch-size "${GLOBAL_BATCH_SIZE}"
    --max-tokens-per-micro-batch "${MAX_TOKENS_PER_MICRO_BATCH}"
    --actor_learning_rate "${ACTOR_LR}"
    --critic_learning_rate "${CRITIC_LR}"
    --seed "${SEED}"
)

EVAL_AND_LOGGING_ARGS=(
    --save "${SAVE}"
    --save-interval 50
    --use_tensorboard
)
if [ -n "${EVAL_DATA}" ]; then
    EVAL_AND_LOGGING_ARGS+=(--eval_data "${EVAL_DATA}" --eval-interval 25)
fi

exec "${PYTHON}" -m megarlhf.cli.train_ppo_ray \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${ROLLOUT_ARGS[@]}" \
    "${PPO_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"
