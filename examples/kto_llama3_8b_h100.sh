#!/usr/bin/env bash
# KTO of Llama-3-8B-Instruct, one node of eight H100s, BF16: columns `input`, `output`, `label`.
#
# A starting point by arithmetic: it has not been run on such a node.
#
#     MODEL=/models/Llama-3-8B-Instruct DATASET=/data/train.jsonl examples/kto_llama3_8b_h100.sh
#     MODEL=... DATASET=... examples/kto_llama3_8b_h100.sh --dry-run       what would run, and where
set -euo pipefail
cd "$(dirname "$0")/.."

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export HF_HUB_OFFLINE=1

# Where things are
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:?directory of the Hugging Face checkpoint}
DATASET=${DATASET:?data to train on}
EVAL_DATASET=${EVAL_DATASET:-}
SAVE=${SAVE:-runs/kto_llama3_8b_h100}
SEED=${SEED:-42}

# Layout: TP inside the node, the rest is data parallelism
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP_SIZE=${TP_SIZE:-2}
PP_SIZE=${PP_SIZE:-1}
CP_SIZE=${CP_SIZE:-1}

# Size of a step, length of the run, learning rate
MAX_EPOCHS=${MAX_EPOCHS:-1}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-128}
MAX_TOKENS_PER_MICRO_BATCH=${MAX_TOKENS_PER_MICRO_BATCH:-16384}
MAX_LEN=${MAX_LEN:-4096}
LR=${LR:-5e-7}

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

DATA_ARGS=(
    --pretrain "${MODEL}"
    --dataset "${DATASET}"
    --output_key output
    --apply_chat_template
    --max_len "${MAX_LEN}"
)

TRAINING_ARGS=(
    --bf16
    --beta 0.1
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

exec "${PYTHON}" -m megarlhf.cli.train_kto \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"
