#!/usr/bin/env bash
# Supervised fine-tuning of Llama-3-70B-Instruct, eight nodes of eight H100s, BF16: chats in the column `messages`.
# The same command on every node, with its NODE_RANK and the MASTER_ADDR of node 0.
#
# A starting point by arithmetic: it has not been run on such nodes.
#
#     MODEL=/models/Llama-3-70B-Instruct DATASET=/data/train.jsonl examples/sft_llama3_70b_h100.sh
#     MODEL=... DATASET=... examples/sft_llama3_70b_h100.sh --dry-run       what would run, and where
set -euo pipefail
cd "$(dirname "$0")/.."

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export HF_HUB_OFFLINE=1

# Where things are
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:?directory of the Hugging Face checkpoint}
DATASET=${DATASET:?data to train on}
EVAL_DATASET=${EVAL_DATASET:-}
SAVE=${SAVE:-runs/sft_llama3_70b_h100}
SEED=${SEED:-42}

# Layout: TP inside the node, the rest is data parallelism
NNODES=${NNODES:-8}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP_SIZE=${TP_SIZE:-8}
PP_SIZE=${PP_SIZE:-2}
CP_SIZE=${CP_SIZE:-1}

# Size of a step, length of the run, learning rate
MAX_EPOCHS=${MAX_EPOCHS:-1}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
MAX_TOKENS_PER_MICRO_BATCH=${MAX_TOKENS_PER_MICRO_BATCH:-8192}
MAX_LEN=${MAX_LEN:-8192}
LR=${LR:-5e-6}

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
    --input_key messages
    --apply_chat_template
    --max_len "${MAX_LEN}"
)

TRAINING_ARGS=(
    --bf16
    --max_epochs "${MAX_EPOCHS}"
    --global-batch-size "${GLOBAL_BATCH_SIZE}"
    --max-tokens-per-micro-batch "${MAX_TOKENS_PER_MICRO_BATCH}"
    --learning_rate "${LR}"
    --seed "${SEED}"
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
)

EVAL_AND_LOGGING_ARGS=(
    --save "${SAVE}"
    --save-interval 200
    --use_tensorboard
)
if [ -n "${EVAL_DATASET}" ]; then
    EVAL_AND_LOGGING_ARGS+=(--eval_dataset "${EVAL_DATASET}" --eval-interval 100)
fi

LAUNCHER=("${PYTHON}" -m torch.distributed.run --nnodes "${NNODES}" --node-rank "${NODE_RANK}"
    --nproc-per-node "${GPUS_PER_NODE}" --master-addr "${MASTER_ADDR}" --master-port "${MASTER_PORT}")
if [[ " $* " == *" --dry-run "* ]]; then
    LAUNCHER=(env WORLD_SIZE="$((NNODES * GPUS_PER_NODE))" "${PYTHON}")
fi
exec "${LAUNCHER[@]}" -m megarlhf.cli.train_sft \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"
