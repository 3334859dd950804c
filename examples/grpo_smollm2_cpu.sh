#!/usr/bin/env bash
# GRPO on SmolLM2-135M-Instruct, two CPU cores, no download: sums and differences of one-digit numbers, rewarded when the
# last number of the response is right. Needs about 10 GB of memory.
#
#     examples/grpo_smollm2_cpu.sh                              everything has a default
#     SAVE=runs/mine LR=1e-5 examples/grpo_smollm2_cpu.sh --train-iters 5 --use_tensorboard
set -euo pipefail
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=1

# Where things are
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-runs/smollm2}
DATA=${DATA:-runs/arithmetic}
SAVE=${SAVE:-runs/grpo_smollm2_cpu}
SEED=${SEED:-42}

# Layout: ranks are processes that share the cores. SmolLM2's 9 heads and 3 KV heads leave TP 1 or 3.
ACTOR_RANKS=${ACTOR_RANKS:-1}
TP_SIZE=${TP_SIZE:-1}
PP_SIZE=${PP_SIZE:-1}
CP_SIZE=${CP_SIZE:-1}
VLLM_ENGINES=${VLLM_ENGINES:-1}

# Size of a step, length of the run, learning rate
TRAIN_ITERS=${TRAIN_ITERS:-30}
PROMPTS=${PROMPTS:-8}
SAMPLES_PER_PROMPT=${SAMPLES_PER_PROMPT:-8}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
GENERATE_MAX_LEN=${GENERATE_MAX_LEN:-24}
LR=${LR:-2e-5}
KL_COEF=${KL_COEF:-0.01}

MODEL_PARALLEL_ARGS=(
    --actor_num_gpus_per_node "${ACTOR_RANKS}"
    --tensor-model-parallel-size "${TP_SIZE}"
    --pipeline-model-parallel-size "${PP_SIZE}"
    --context-parallel-size "${CP_SIZE}"
)

DATA_ARGS=(
    --pretrain "${MODEL}"
    --prompt_data "${DATA}/prompts.jsonl"
    --eval_data "${DATA}/heldout.jsonl"
    --apply_chat_template
    --reward_function examples/arithmetic_reward.py
)

ROLLOUT_ARGS=(
    --vllm_num_engines "${VLLM_ENGINES}"
    --rollout_batch_size "${PROMPTS}"
    --n_samples_per_prompt "${SAMPLES_PER_PROMPT}"
    --prompt_max_len 64
    --generate_max_len "${GENERATE_MAX_LEN}"
    --temperature 1.0
)

GRPO_ARGS=(
    --advantage_estimator group_norm
    --no-normalize_advantages          # the group's own mean and std are the normalization
    --use_kl_loss
    --kl_estimator k3
    --init_kl_coef "${KL_COEF}"
)

TRAINING_ARGS=(
    --train-iters "${TRAIN_ITERS}"
    --global-batch-size "$((PROMPTS * SAMPLES_PER_PROMPT))"
    --micro-batch-size "${MICRO_BATCH_SIZE}"
    --actor_learning_rate "${LR}"
    --lr-decay-style constant
    --seed "${SEED}"
)

EVAL_AND_LOGGING_ARGS=(
    --save "${SAVE}"
    --eval-interval 10
)

"${PYTHON}" examples/smollm2.py "${MODEL}"
if [ ! -e "${DATA}/prompts.jsonl" ]; then
    "${PYTHON}" examples/arithmetic_data.py "${DATA}" --seed "${SEED}"
fi
exec "${PYTHON}" -m megarlhf.cli.train_ppo_ray \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${ROLLOUT_ARGS[@]}" \
    "${GRPO_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"
