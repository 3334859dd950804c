#!/usr/bin/env bash
# All of RLHF on SmolLM2-135M-Instruct, two CPU cores, no download, under 40 minutes: say three words in the case that is
# asked for. A few supervised steps; the model's own answers, of which a rule prefers the right ones to the wrong ones; a
# reward model from these pairs and from answers in the right and in the wrong case; PPO against the reward model, whose
# ranks are two pipeline stages while the actor's are data-parallel. In PPO, with RLOO's baseline, the rule only watches: its weight is 0.
#
#     examples/rlhf_smollm2_cpu.sh                        everything goes to runs/rlhf_smollm2_cpu
#     OUT=runs/mine examples/rlhf_smollm2_cpu.sh --train-iters 5     further flags go to PPO
set -euo pipefail
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=1

# Where things are; stages that are done are not done again
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-runs/smollm2}
DATA=${DATA:-runs/words}
OUT=${OUT:-runs/rlhf_smollm2_cpu}
SEED=${SEED:-42}

SFT_ITERS=${SFT_ITERS:-20}
RM_ITERS=${RM_ITERS:-80}
TRAIN_ITERS=${TRAIN_ITERS:-30}
PROMPTS=${PROMPTS:-8}
SAMPLES_PER_PROMPT=${SAMPLES_PER_PROMPT:-16}
LR=${LR:-1.5e-5}

SFT_ARGS=(
    --pretrain "${MODEL}"
    --dataset "${DATA}/sft.jsonl"
    --eval_dataset "${DATA}/heldout_sft.jsonl"
    --output_key output
    --apply_chat_template
    --max_len 128
    --train-iters "${SFT_ITERS}"
    --global-batch-size 16
    --micro-batch-size 8
    --learning_rate 2e-5
    --load_checkpoint
    --save "${OUT}/sft"
    --seed "${SEED}"
)

GENERATE_ARGS=(
    --pretrain "${OUT}/sft/hf"
    --prompt_data "${DATA}/prompts.jsonl"
    --apply_chat_template
    --n_samples_per_prompt 8
    --prompt_max_len 80
    --generate_max_len 24
    --seed "${SEED}"
)

RM_ARGS=(
    --pretrain "${OUT}/sft/hf"
    --dataset "${OUT}/pairs.jsonl,${OUT}/preferences.jsonl"
    --eval_split 0.1
    --prompt_key prompt
    --max_len 128
    --train-iters "${RM_ITERS}"
    --global-batch-size 16
    --micro-batch-size 8
    --learning_rate 5e-5
    --load_checkpoint
    --save "${OUT}/rm"
    --seed "${SEED}"
)

PPO_MODEL_PARALLEL_ARGS=(
    --actor_num_gpus_per_node 2        # data-parallel
    --reward_num_gpus_per_node 2
    --reward_pipeline_model_parallel_size 2
    --vllm_num_engines 1
)

PPO_DATA_ARGS=(
    --pretrain "${OUT}/sft/hf"
    --reward_pretrain "${OUT}/rm/hf"
    --normalize_reward
    --reward_rule exact_match
    --reward_weights 1 0
    --prompt_data "${DATA}/prompts.jsonl"
    --eval_data "${DATA}/heldout_prompts.jsonl"
    --apply_chat_template
    --prompt_max_len 80
    --generate_max_len 24
)

PPO_ARGS=(
    --advantage_estimator rloo         # a critic would have to learn in 30 steps what 16 samples of a prompt tell at once
    --rollout_batch_size "${PROMPTS}"
    --n_samples_per_prompt "${SAMPLES_PER_PROMPT}"
    --global-batch-size "$((PROMPTS * SAMPLES_PER_PROMPT))"
    --micro-batch-size 4
    --train-iters "${TRAIN_ITERS}"
    --actor_learning_rate "${LR}"
    --init_kl_coef 0.03
    --eval-interval 5
    --load_checkpoint
    --save "${OUT}/ppo"
    --seed "${SEED}"
)

"${PYTHON}" examples/smollm2.py "${MODEL}"
if [ ! -e "${DATA}/prompts.jsonl" ]; then
    "${PYTHON}" examples/words_data.py "${DATA}" --seed "${SEED}"
fi

echo "== 1/4 supervised fine-tuning"
[ -e "${OUT}/sft/hf" ] || "${PYTHON}" -m megarlhf.cli.train_sft "${SFT_ARGS[@]}"

echo "== 2/4 pairs of the model's own answers"
if [ ! -e "${OUT}/pairs.jsonl" ]; then
    "${PYTHON}" examples/rendered.py "${MODEL}" "${DATA}/preferences.jsonl" "${OUT}/preferences.jsonl"
    "${PYTHON}" -m megarlhf.cli.generate "${GENERATE_ARGS[@]}" --output "${OUT}/samples.jsonl"
    "${PYTHON}" -m megarlhf.cli.score --dataset "${OUT}/samples.jsonl" --reward_rule exact_match --output "${OUT}/scored.jsonl"
    "${PYTHON}" -m megarlhf.cli.select --dataset "${OUT}/scored.jsonl" --post_processor iter_dpo --output "${OUT}/pairs.jsonl"
fi

echo "== 3/4 reward model"
[ -e "${OUT}/rm/hf" ] || "${PYTHON}" -m megarlhf.cli.train_rm "${RM_ARGS[@]}"

echo "== 4/4 PPO"
exec "${PYTHON}" -m megarlhf.cli.main ppo \
    "${PPO_MODEL_PARALLEL_ARGS[@]}" \
    "${PPO_DATA_ARGS[@]}" \
    "${PPO_ARGS[@]}" \
    "$@"
