"""The one table of metrics: every name that a run may log, with its meaning and unit.

docs/metrics.md is written from it: `python -m megarlhf.metrics.keys > docs/metrics.md`
"""

import difflib
import re
from collections.abc import Mapping

_ROUTERS = {
    "moe_balance_loss": "Load-balancing loss of the routers before its coefficient; 1 is perfect balance (no unit)",
    "moe_load_max": "Tokens of the busiest expert over an even share, worst layer (ratio)",
    "moe_load_min": "Tokens of the idlest expert over an even share, worst layer (ratio)",
    "moe_router_log_prob": "Log-prob that the routers give to the experts they choose, mean over tokens (nats)",
}


def _inside(meaning: str) -> str:
    """A meaning within a sentence; abbreviations keep their capitals."""
    return f"{meaning[0].lower()}{meaning[1:]}" if meaning[1].islower() else meaning


def _supervised(name: str, loss: str, **others: str) -> dict[str, str]:
    """Metrics of a supervised trainer: its loss and its others, which evaluation has too, and those of every one.

    Args:
        others: name -> meaning and unit.
    """
    own = {"loss": loss} | others
    common = {
        "grad_norm": "Norm of the gradient before clipping (no unit)",
        "learning_rate": "Learning rate of the last optimizer step (no unit)",
        **_ROUTERS,
    }
    of_evaluation = {f"eval_{key}": f"Of the evaluation data: {_inside(meaning)}" for key, meaning in own.items()}
    return {f"{name}/{key}": meaning for key, meaning in (own | common | of_evaluation).items()}


METRICS: dict[str, str] = {
    "reward/mean": "Mean outcome reward of the step's samples, before KL and overlong penalties (reward units)",
    "reward/std": "Standard deviation of that reward over the samples (reward units)",
    "reward/no_result_count": "Samples that the reward gave no result for, left out of training (samples)",
    "reward/SOURCE/mean": "Mean of one source of the reward, or of a further number of it, before weights (its units)",
    "reward/SOURCE/no_result_count": "Samples that it gave no result for (samples)",
    "reward/untrained_steps": "Steps so far that were not trained as too few rewards gave a result (steps)",
    "reward/overlong_penalty": "Mean of what the overlong penalty adds to the rewards, 0 or less (reward units)",
    "kl/mean": "Estimated KL of the policy to the reference, mean over response tokens (nats per token)",
    "kl/coef": "Coefficient of the KL penalty in this step (reward units per nat)",
    "policy/loss": "Policy loss, mean over the step's optimizer steps (no unit)",
    "policy/clip_frac": "Response tokens whose probability ratio was clipped (fraction)",
    "policy/entropy": "Entropy of the policy's next-token distribution, mean over response tokens (nats per token)",
    "policy/approx_kl": "Estimated KL of the policy in the update to the one that generated (nats per token)",
    "policy/grad_norm": "Norm of the actor's gradient before clipping (no unit)",
    "policy/learning_rate": "Learning rate of the actor's last optimizer step (no unit)",
    "policy/ratio_mean": "Mean of p(response token) in the update over p at generation (ratio)",
    "policy/tis_mean": "Mean of p(response token) in training over p in vLLM, same weights; 1 in expectation (ratio)",
    "policy/tis_clip_frac": "Response tokens whose such ratio was capped, or left out with --tis_mask_range (fraction)",
    "policy/ptx_loss": "Cross-entropy of the pretraining documents' tokens, before ptx_coef (nats per token)",
    **{f"policy/{name}": meaning for name, meaning in _ROUTERS.items()},
    "critic/loss": "Value loss, mean over the step's optimizer steps (squared reward units)",
    "critic/clip_frac": "Response tokens whose value was clipped (fraction)",
    "critic/explained_variance": "Share of the returns' variance that the values explain; 1 is perfect (fraction)",
    "critic/value_mean": "Mean value of response tokens (reward units)",
    "critic/grad_norm": "Norm of the critic's gradient before clipping (no unit)",
    "critic/learning_rate": "Learning rate of the critic's last optimizer step (no unit)",
    **{f"critic/{name}": meaning for name, meaning in _ROUTERS.items()},
    "advantage/mean": "Mean advantage over response tokens, normalized where that is on (reward units or none)",
    "advantage/std": "Standard deviation of that advantage over response tokens (reward units or none)",
    "return/mean": "Mean return over response tokens (reward units)",
    "rollout/response_length_mean": "Mean length of a response (tokens)",
    "rollout/response_length_max": "Longest response of the step (tokens)",
    "rollout/prompt_length_mean": "Mean length of a prompt (tokens)",
    "rollout/truncated_frac": "Responses cut at the length limit (fraction)",
    "rollout/filter_rounds": "Rounds of generating that dynamic filtering took in the step (rounds)",
    "rollout/filtered_groups": "Prompts that dynamic filtering left out, whose rewards teach nothing (prompts)",
    "rollout/surplus_groups": "Prompts that dynamic filtering kept beyond rollout_batch_size, not trained on (prompts)",
    "rollout/overlong_filtered": "Samples cut at the length limit, left out of the losses (samples)",
    "rollout/logprob_diff_mean": "Mean |log-prob in training - log-prob in vLLM| of the same response tokens (nats)",
    "rollout/logprob_diff_max": "Largest such difference in the step (nats)",
    "rollout/logprob_kl": "Estimated KL of the policy in training from the one in vLLM, same weights (nats per token)",
    "precision/PHASE/fp8": "Whether a phase (rollout, log_prob, train; critic_train) is in FP8 (1 or 0)",
    "precision/PHASE/fallbacks": "Times so far that the phase has left FP8 (count)",
    "precision/PHASE/amax": "Largest finite |number| that the step's passes gave to FP8, on a CPU (no unit)",
    "precision/PHASE/saturated_frac": "Numbers beyond FP8's largest in the worst of these passes, on a CPU (fraction)",
    "sync/version": "Policy version that the inference engines hold after the step (count)",
    "sync/bytes": "Weights that each inference engine reads, as the trainer holds them (bytes)",
    "memory/ROLE/parameters_gib": "Weights of a role, the most on one device so far; in a run's first step (GiB)",
    "memory/ROLE/gradients_gib": "Gradients of a role, the most on one device so far; there in updates alone (GiB)",
    "memory/ROLE/optimizer_gib": "Running means and main weights of a role, the most on one device so far (GiB)",
    "memory/ROLE/reference_gib": "Reference beside a role, the most on one device; there while it computes alone (GiB)",
    "time/rollout_seconds": "Generating responses (seconds)",
    "time/reward_seconds": "Scoring responses (seconds)",
    "time/experience_seconds": "Log-probs, reference log-probs, values; beside scoring what outlasts it (seconds)",
    "time/train_seconds": "Forward, backward and optimizer steps (seconds)",
    "time/sync_seconds": "Moving the weights to the inference engines (seconds)",
    "time/eval_seconds": "Evaluation (seconds)",
    "time/save_seconds": "Writing the checkpoint since the row before (seconds)",
    "time/ROLE/PHASE/slowest_rank": "Rank (or engine) that is slowest at its own part of a phase (number from 0)",
    "time/ROLE/PHASE/slowest_seconds": "What it takes for that; of updates up to the summing of gradients (seconds)",
    "time/ROLE/PHASE/slowest_ratio": "That over the median rank's, of engines by generated token (ratio)",
    "time/step_seconds": "The whole step without evaluation and saving (seconds)",
    "perf/tokens_per_second": "RL: response tokens, else: all tokens of the step, over its time (tokens/s)",
    "perf/samples_per_second": "RL: samples generated, else: trained on in the step, over its time (samples/s)",
    "eval/accuracy": "Evaluation prompts whose one greedy response earns 1 or more by rule and function (fraction)",
    "eval/reward_mean": "Mean reward of these greedy responses (reward units)",
    "eval/pass@K": "Chance that of K sampled responses to a prompt one earns at least 1; of prompts with K (fraction)",
    "eval/no_result_count": "Evaluation responses, greedy and sampled, without a result, left out (samples)",
    "eval/response_length_mean": "Mean length of a greedy evaluation response (tokens)",
    "eval/SET/KEY": "Such a key of one of several sets; eval/KEY is their mean, of counts the sum (as the key's)",
    "select/rows": "Rows that a round of megarlhf iterate trains on (rows)",
    "select/ties": "Prompts of the round left out as their samples have one reward (prompts)",
    "select/no_result_count": "Prompts, or samples of conditional SFT, left out for want of a result or text (count)",
    "data/epoch": "Passes over the training data so far (epochs)",
    "data/prompts_dropped": "Prompts left out so far for being longer than the limit (prompts)",
    **_supervised("sft", "Cross-entropy of the target tokens (nats per token)"),
    **_supervised(
        "prm",
        "Cross-entropy of the steps' labels (nats per step)",
        accuracy="Steps that the model judges as their label's likeliest token does (fraction)",
    ),
    **_supervised(
        "dpo",
        "Loss of DPO, cDPO or IPO, with the weighted cross-entropy of chosen answers, mean over pairs (no unit)",
        accuracy="Pairs whose chosen answer has the larger reward (fraction)",
        margin="Mean reward of chosen minus that of rejected answers (beta x nats)",
        chosen_reward="Mean over chosen answers of beta x their log-ratio to the reference (beta x nats)",
        rejected_reward="Mean over rejected answers of beta x their log-ratio to the reference (beta x nats)",
        chosen_log_prob="Mean log-prob of chosen answers' tokens (nats per token)",
        rejected_log_prob="Mean log-prob of rejected answers' tokens (nats per token)",
    ),
    **_supervised(
        "kto",
        "KTO loss, mean over answers (no unit)",
        accuracy="Answers whose log-ratio lies above the KL if desirable, below it if not (fraction)",
        margin="Mean reward of desirable minus that of undesirable answers (beta x nats)",
        desirable_reward="Mean over desirable answers of beta x their log-ratio to the reference (beta x nats)",
        undesirable_reward="Mean over undesirable answers of beta x their log-ratio to the reference (beta x nats)",
        kl="KL of the policy to the reference as unmatched answers estimate it, 0 where that is below 0 (nats)",
    ),
    **_supervised(
        "kd",
        "Cross-entropy with the target tokens, and with the teacher's distribution by kd_coef (nats per token)",
        lm_loss="Cross-entropy of the target tokens (nats per token)",
        kl="KL of student and teacher at the target tokens, kd_loss says in which direction (nats per token)",
        teacher_entropy="Entropy of the teacher's distribution of the target tokens (nats per token)",
    ),
    **_supervised(
        "rm",
        "Loss of the reward model, mean over pairs (nats per pair)",
        accuracy="Pairs whose chosen answer has the larger reward (fraction)",
        margin="Mean reward of chosen minus that of rejected answers (reward units)",
        chosen_reward="Mean reward of chosen answers (reward units)",
        rejected_reward="Mean reward of rejected answers (reward units)",
        reward_mean="Mean reward of all answers (reward units)",
        reward_std="Standard deviation of the reward over all answers (reward units)",
    ),
}


def _general(key: str) -> str:
    """The name in METRICS of a key that has a role's, a source's or a set's name or a number in it."""
    key = re.sub("^memory/[a-z_0-9]+/", "memory/ROLE/", key)
    key = re.sub("^time/[a-z_0-9]+/[a-z]+/", "time/ROLE/PHASE/", key)
    key = re.sub("^precision/[a-z_]+/", "precision/PHASE/", key)
    key = re.sub(r"^eval/pass@\d+$", "eval/pass@K", re.sub("^eval/[^/]+/", "eval/", key))
    return re.sub("^reward/.+/(mean|no_result_count)$", r"reward/SOURCE/\1", key)


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raises ValueError for a name outside METRICS, with the nearest known one."""
    for key in metrics:
        if _general(key) not in METRICS:
            nearest = difflib.get_close_matches(key, METRICS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"metric {key!r} is not in the table of metrics, megarlhf/metrics/keys.py; did you mean {nearest!r}?"
            )


def markdown_table() -> str:
    """METRICS as a Markdown table, in the table's order."""
    rows = [f"| `{key}` | {meaning.replace('|', chr(92) + '|')} |" for key, meaning in METRICS.items()]
    return "\n".join(["| metric | meaning (unit) |", "|---|---|", *rows]) + "\n"


def main() -> None:
    """Print docs/metrics.md."""
    print("# Metrics\n")
    print("Every step is one object in `metrics.jsonl`: the key `step` and those of the keys below that the step has.")
    print("A number that is not finite, such as a ratio that overflows, is `null` there; a warning names its key once.")
    print("Written by `python -m megarlhf.metrics.keys > docs/metrics.md`.\n")
    print(markdown_table(), end="")


if __name__ == "__main__":
    main()
