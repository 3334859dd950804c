#!/usr/bin/env bash
# KTO of SmolLM2-135M-Instruct, two CPU cores, no download: answers that are good or bad, one a
# request.
#
#     examples/kto_smollm2_cpu.sh                              everything has a default
#     SAVE=runs/mine LR=1e-5 examples/kto_smollm2_cpu.sh --train-iters 5 --use_tensorboard
set -euo pipefail
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=1

# Where things are
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-runs/smollm2}
DATA=${DATA:-runs/words}
SAVE=${SAVE:-runs/kto_smollm2_cpu}
SEED=${SEED:-42}

# Layout: ranks are processes that share the cores. SmolLM2's 9 heads and 3 KV heads leave TP 1 or 3.
RANKS=${RANKS:-1}
TP_SIZE=${TP_SIZE:-1}
PP_SIZE=${PP_SIZE:-1}
CP_SIZE=${CP_SIZE:-1}

# Size of a step, length of the run, learning rate
TRAIN_ITERS=${TRAIN_ITERS:-46}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
MAX_LEN=${MAX_LEN:-128}
LR=${LR:-5e-6}

MODEL_PARALLEL_ARGS=(
    --num_gpus_per_node "${RANKS}"
    --tensor-model-parallel-size "${TP_SIZE}"
    --pipeline-model-parallel-size "${PP_SIZE}"
    --context-parallel-size "${CP_SIZE}"
)

DATA_ARGS=(
    --pretrain "${MODEL}"
    --dataset "${DATA}/kto.jsonl"
    --eval_dataset "${DATA}/heldout_kto.jsonl"
    --output_key output
    --apply_chat_template
    --max_len "${MAX_LEN}"
)

TRAINING_ARGS=(
    --beta 0.1
    --train-iters "${TRAIN_ITERS}"
    --global-batch-size "${GLOBAL_BATCH_SIZE}"
    --micro-batch-size "${MICRO_BATCH_SIZE}"
    --learning_rate "${LR}"
    --seed "${SEED}"
)

EVAL_AND_LOGGING_ARGS=(
    --save "${SAVE}"
    --eval-interval 10
)

"${PYTHON}" examples/smollm2.py "${MODEL}"
if [ ! -e "${DATA}/kto.jsonl" ]; then
    "${PYTHON}" examples/words_data.py "${DATA}" --seed "${SEED}"
fi
exec "${PYTHON}" -m megarlhf.cli.train_kto \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"
