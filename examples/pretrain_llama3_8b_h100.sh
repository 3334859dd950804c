#!/usr/bin/env bash
# Continued pre-training of Llama-3-8B, one node of eight H100s, BF16: a blend of Megatron's indexed data sets.
#
# A starting point by arithmetic: it has not been run on such a node.
#
#     tools/preprocess_data.py --input wiki.jsonl --output-prefix /data/wiki --tokenizer-type HuggingFaceTokenizer \
#         --tokenizer-model /models/Llama-3-8B --append-eod
#     MODEL=/models/Llama-3-8B DATA_PATH="0.7 /data/wiki_text_document 0.3 /data/code_text_document" \
#         examples/pretrain_llama3_8b_h100.sh
#     MODEL=... DATA_PATH=... examples/pretrain_llama3_8b_h100.sh --dry-run       what would run, and its bytes
set -euo pipefail
cd "$(dirname "$0")/.."

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export HF_HUB_OFFLINE=1

# Where things are. Data: paths without .bin and .idx, with spaces between them and the weights.
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:?directory of the Hugging Face checkpoint}
read -r -a DATA_PATH <<< "${DATA_PATH:?indexed data sets: weight path weight path}"
SPLIT=${SPLIT:-949,50,1}
SAVE=${SAVE:-runs/pretrain_llama3_8b_h100}
SEED=${SEED:-42}

# Layout: TP inside the node, the rest is data parallelism (8 GPUs / TP 2 = 4)
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP_SIZE=${TP_SIZE:-2}
PP_SIZE=${PP_SIZE:-1}
CP_SIZE=${CP_SIZE:-1}

# Size of a step, length of the run, learning rate
TRAIN_ITERS=${TRAIN_ITERS:-10000}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-128}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
SEQ_LENGTH=${SEQ_LENGTH:-8192}
LR=${LR:-3e-5}

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
    --pretrain_mode
    --data-path "${DATA_PATH[@]}"
    --split "${SPLIT}"
    --seq-length "${SEQ_LENGTH}"
)

TRAINING_ARGS=(
    --bf16
    --train-iters "${TRAIN_ITERS}"
    --global-batch-size "${GLOBAL_BATCH_SIZE}"
    --micro-batch-size "${MICRO_BATCH_SIZE}"
    --learning_rate "${LR}"
    --lr_warmup_ratio 0.01
    --weight_decay 0.1
    --seed "${SEED}"
)

EVAL_AND_LOGGING_ARGS=(
    --save "${SAVE}"
    --save-interval 500
    --eval-interval 500
    --eval-iters 20
    --use_tensorboard
)

exec "${PYTHON}" -m megarlhf.cli.train_sft \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"
