#!/usr/bin/env bash
# The whole of RLHF in a few minutes on two CPU cores, without a download: a tiny untrained Llama learns a little from
# a few demonstrations, then PPO (actor, critic, KL to the reference) teaches it the task through a verifiable reward.
#
#     examples/demo/run.sh                          everything goes to runs/demo
#     examples/demo/run.sh --train-iters 20         further flags go to PPO; --seed N holds for every stage
#     examples/demo/run.sh --no_ray                 the same model, from plain child processes
#
# From the environment: SEED, OUT (output directory), PYTHON.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
OUT=${OUT:-runs/demo}
SEED=${SEED:-42}
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case ${arguments[i]} in
        --seed) SEED=${arguments[i + 1]:?--seed needs a number} ;;
        --seed=*) SEED=${arguments[i]#--seed=} ;;
    esac
done

# An earlier demo is replaced; a directory that is not one is left alone.
MARKER=.megarlhf-demo
if [ -e "${OUT}" ] && [ ! -e "${OUT}/${MARKER}" ]; then
    echo "${OUT} exists and is no earlier demo: remove it, or choose another directory with OUT=..." >&2
    exit 2
fi
rm -rf "${OUT}"
mkdir -p "${OUT}"
touch "${OUT}/${MARKER}"

MODEL_PARALLEL_ARGS=(
    --actor_num_gpus_per_node 2        # ranks of actor and critic; processes where there is no GPU
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1   # so the two ranks are data-parallel, with the optimizer's state sharded
)

SFT_ARGS=(
    --pretrain "${OUT}/model"
    --dataset "${OUT}/sft.jsonl"
    --input_key input
    --output_key output
    --max_len 32
    --train-iters 40
    --global-batch-size 16
    --micro-batch-size 16
    --learning_rate 1e-3
    --log-interval 10
    --save "${OUT}/sft"
    --seed "${SEED}"
)

DATA_ARGS=(
    --pretrain "${OUT}/sft/hf"
    --prompt_data "${OUT}/prompts.jsonl"
    --eval_data "${OUT}/heldout.jsonl"
    --reward_function examples/demo/reward.py
)

ROLLOUT_ARGS=(
    --rollout_batch_size 128           # prompts a step
    --n_samples_per_prompt 8
    --prompt_max_len 16
    --generate_max_len 8
    --vllm_num_engines 1
    --vllm_kv_cache_gib 0.25
)

PPO_ARGS=(
    --advantage_estimator gae
    --init_kl_coef 0.01
    --global-batch-size 512            # two optimizer steps a rollout
    --micro-batch-size 256
    --train-iters 75
    --actor_learning_rate 6e-4
    --critic_learning_rate 1e-3
)

EVAL_AND_LOGGING_ARGS=(
    --eval-interval 10
    --log-interval 5
    --save "${OUT}/ppo"
    --seed "${SEED}"
)

echo "== 1/3 model and data"
"${PYTHON}" examples/demo/make_assets.py "${OUT}" --seed "${SEED}"

echo "== 2/3 supervised fine-tuning"
"${PYTHON}" -m megarlhf.cli.train_sft "${SFT_ARGS[@]}"

echo "== 3/3 PPO"
"${PYTHON}" -m megarlhf.cli.train_ppo_ray \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${ROLLOUT_ARGS[@]}" \
    "${PPO_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    "$@"

# eval/accuracy: the fraction of held-out prompts whose greedy response earns a reward of 1.0, that is, is exactly right.
"${PYTHON}" - "${OUT}" "${SECONDS}" <<'PYTHON'
import json, pathlib, sys

out, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
metrics = out / "ppo" / "metrics.jsonl"
if not metrics.exists():  # --dry-run, or --save to another place
    sys.exit()
rows = [json.loads(line) for line in metrics.read_text().splitlines()]
accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
print(f"\nheld-out accuracy (greedy, exact match): {accuracy[0]:.1%} before PPO, {accuracy[-1]:.1%} after")
print(f"trained model: {out}/ppo/hf\nreport: {out}/ppo/report.html\ntime: {seconds // 60} min {seconds % 60} s")
PYTHON
