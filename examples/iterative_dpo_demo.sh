#!/usr/bin/env bash
# Iterative DPO in a few minutes on two CPU cores, without a download: the demo's model (examples/demo) answers
# prompts 16 times each, learns to prefer the best answer to the worst one, and again.
#
#     examples/iterative_dpo_demo.sh                      everything goes to runs/iterative_dpo_demo
#     examples/iterative_dpo_demo.sh --num_rounds 4       further flags go to megarlhf iterate
#
# Killed anywhere, the same command goes on. From the environment: SAVE, DATA (the demo's model and data), LR, PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
SAVE=${SAVE:-runs/iterative_dpo_demo}
DATA=${DATA:-runs/loop_demo_data}
LR=${LR:-3e-4}

# A model that has learned a little from demonstrations, made once.
if [ ! -e "${DATA}/sft/hf" ]; then
    "${PYTHON}" examples/demo/make_assets.py "${DATA}"
    "${PYTHON}" -m megarlhf.cli.train_sft --pretrain "${DATA}/model" --dataset "${DATA}/sft.jsonl" \
        --input_key input --output_key output --max_len 32 --train-iters 40 --global-batch-size 16 \
        --micro-batch-size 16 --learning_rate 1e-3 --log-interval 20 --save "${DATA}/sft" --load_checkpoint
fi

DATA_ARGS=(
    --pretrain "${DATA}/sft/hf"
    --prompt_data "${DATA}/prompts.jsonl"
    --eval_data "${DATA}/heldout.jsonl"
    --reward_function examples/demo/reward.py
)

ROUND_ARGS=(
    --method iterative_dpo
    --num_rounds 2
    --rollout_batch_size 400           # prompts a round
    --n_samples_per_prompt 16
    --prompt_max_len 16
    --generate_max_len 8
    --vllm_kv_cache_gib 0.25
)

TRAINING_ARGS=(
    --max_epochs 4                     # over the samples that are selected
    --max_len 32
    --beta 0.1
    --nll_loss_coef 1                  # also imitates the best answers
    --reference fixed                  # the model before the first round
    --global-batch-size 32
    --micro-batch-size 32
    --learning_rate "${LR}"
    --log-interval 20
)

exec "${PYTHON}" -m megarlhf.cli.iterate "${DATA_ARGS[@]}" "${ROUND_ARGS[@]}" "${TRAINING_ARGS[@]}" --save "${SAVE}" "$@"
