#!/usr/bin/env bash
# A process reward model from Llama-3-8B-Instruct, one node of eight H100s, BF16: columns `input`, with a
# placeholder token behind each step, and `label`, one reward token for each.
#
# A starting point by arithmetic: it has not been run on such a node.
#
#     MODEL=/models/Llama-3-8B-Instruct DATASET=/data/train.jsonl examples/prm_llama3_8b_h100.sh
#     MODEL=... DATASET=... examples/prm_llama3_8b_h100.sh --dry-run       what would run, and where
set -euo pipefail
cd "$(dirname "$0")/.."

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export HF_HUB_OFFLINE=1

# Where things are
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:?directory of the Hugging Face checkpoint}
DATASET=${DATASET:?data to train on}
EVAL_DATASET=${EVAL_DATASET:-}
PLACEHOLDER_TOKEN=${PLACEHOLDER_TOKEN:-<|reserved_special_token_0|>}
REWARD_TOKENS=${REWARD_TOKENS:-+ -}
SAVE=${SAVE:-runs/prm_llama3_8b_h100}
SEED=${SEED:-42}

# Layout: TP inside the node, the rest is data parallelism
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP_SIZE=${TP_SIZE:-2}
PP_SIZE=${PP_SIZE:-1}
CP_SIZE=${CP_SIZE:-1}

# Size of a step, length of the run, learning rate
MAX_EPOCHS=${MAX_EPOCHS:-1}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
MAX_TOKENS_PER_MICRO_BATCH=${MAX_TOKENS_PER_MICRO_BATCH:-16384}
MAX_LEN=${MAX_LEN:-8192}
LR=${LR:-1e-6}

MODEL_PARALLEL_ARGS=(
    --num_gpus_per_node "${GPUS_PER_NODE}"
    --tensor-model-parallel-size "${TP_SIZE}"
    --pipeline-model-parallel-size "${PP_SIZE}"
    --context-parallel-size "${CP_SIZE}"
    --use-distributed-optimizer
)
if [ "${TP_SIZE}" -gt 1 ]; then
    MODEL_PARALLEL_ARGS+=(--sequence-parallel)
fi

read -ra REWARD_WORDS <<< "${REWARD_TOKENS}"
DATA_ARGS=(
    --pretrain "${MODEL}"
    --dataset "${DATASET}"
    --placeholder_token "${PLACEHOLDER_TOKEN}"
    --reward_tokens "${REWARD_WORDS[@]}"
    --max_len "${MAX_LEN}"
)

TRAINING_ARGS=(
    --bf16
    --max_epochs "${MAX_EPOCHS}"
    --global-batch-size "${GLOBAL_BATCH_SIZE}"
    --max-tokens-per-micro-batch "${MAX_TOKENS_PER_MICRO_BATCH}"
    --learning_rate "${LR}"
    --seed "${SEED}"
)

EVAL_AND_LOGGING_ARGS=(
    --save "${SAVE}"
    --save-interval 200
    --use_tensorboard
)
if [ -n "${EVAL_DATASET}" ]; then
    EVAL_AND_LOGGING_ARGS+=(--eval_dataset "${EVAL_DATASET}" --eval-interval 100)
fi

exec "${PYTHON}" -m megarlhf.cli.train_prm \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"
