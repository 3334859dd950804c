#!/usr/bin/env bash
# Continued pre-training of SmolLM2-135M-Instruct, two CPU cores, no download: a blend of two corpora of worked sums, which
# tools/preprocess_data.py makes tokens of.
#
#     examples/pretrain_smollm2_cpu.sh                              everything has a default
#     SAVE=runs/mine LR=1e-5 examples/pretrain_smollm2_cpu.sh --train-iters 5 --use_tensorboard
set -euo pipefail
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=1

# Where things are
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-runs/smollm2}
DATA=${DATA:-runs/corpora}
SAVE=${SAVE:-runs/pretrain_smollm2_cpu}
SEED=${SEED:-42}

# Layout: ranks are processes that share the cores. SmolLM2's 9 heads and 3 KV heads leave TP 1 or 3.
RANKS=${RANKS:-1}
TP_SIZE=${TP_SIZE:-1}
PP_SIZE=${PP_SIZE:-1}
CP_SIZE=${CP_SIZE:-1}

# Size of a step, length of the run, learning rate
TRAIN_ITERS=${TRAIN_ITERS:-20}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-8}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
SEQ_LENGTH=${SEQ_LENGTH:-128}
LR=${LR:-1e-4}

MODEL_PARALLEL_ARGS=(
    --num_gpus_per_node "${RANKS}"
    --tensor-model-parallel-size "${TP_SIZE}"
    --pipeline-model-parallel-size "${PP_SIZE}"
    --context-parallel-size "${CP_SIZE}"
)

DATA_ARGS=(
    --pretrain "${MODEL}"
    --pretrain_mode
    --data-path 0.7 "${DATA}/sums_text_document" 0.3 "${DATA}/long_sums_text_document"
    --split '90,9,1'
    --seq-length "${SEQ_LENGTH}"
)

TRAINING_ARGS=(
    --train-iters "${TRAIN_ITERS}"
    --global-batch-size "${GLOBAL_BATCH_SIZE}"
    --micro-batch-size "${MICRO_BATCH_SIZE}"
    --learning_rate "${LR}"
    --seed "${SEED}"
)

EVAL_AND_LOGGING_ARGS=(
    --save "${SAVE}"
    --eval-interval 10
    --eval-iters 2
)

"${PYTHON}" examples/smollm2.py "${MODEL}"
for CORPUS in sums long_sums; do
    if [ ! -e "${DATA}/${CORPUS}_text_document.idx" ]; then
        "${PYTHON}" examples/corpora.py "${DATA}" --seed "${SEED}"
        "${PYTHON}" tools/preprocess_data.py \
            --input "${DATA}/${CORPUS}.jsonl" \
            --output-prefix "${DATA}/${CORPUS}" \
            --tokenizer-type HuggingFaceTokenizer \
            --tokenizer-model "${MODEL}" \
            --append-eod \
            --workers 2
    fi
done
exec "${PYTHON}" -m megarlhf.cli.train_sft \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"
