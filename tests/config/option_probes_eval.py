"""Every option of `megarlhf eval`: those of engines, prompts and rewards as elsewhere, and its own."""

from dataclasses import replace
from typing import Any

from tests.config.in_process import Trace
from tests.config.option_probes import Options, Probe, Seen, both, own_layout_probes
from tests.config.option_probes_loops import GENERATE, MODELS, SCORE, lines, of
from tests.config.option_probes_ppo import JUDGED, REWARD


def renamed(also: Options) -> Options:
    """What is generated from is what is measured on here."""
    return {"eval_data" if name == "prompt_data" else name: value for name, value in also.items()}


def sampled(name: str) -> Seen:
    """A field of the first sampled response's SamplingParams; the greedy one's come before."""
    return lambda trace: getattr(trace.llms[0].parameters[1][0], name)


def metrics(*names: str) -> Seen:
    """Metrics of the results."""
    return lambda trace: [trace.given["metrics"][0].get(name) for name in names]


def has(trace: Trace) -> list[str]:
    """Keys of accuracies."""
    return sorted(key for key in trace.given["metrics"][0] if key.endswith("accuracy"))


NOT_HERE = (
    "prompt_data prompt_data_probs prompt_split output n_samples_per_prompt greedy iter rollout_batch_size enable_csft "
    "csft_prompt skip_special_tokens temperature top_p top_k min_p repetition_penalty"
)
TWO: Options = {"eval_n_samples_per_prompt": 2}
DRAWN: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.3}


def weights(trace: Trace) -> set[float]:
    """What the sources' sum is of the reward that FakeScorer gives as each source."""
    own = [(sum(map(ord, row["output"])) % 7 + row["index"]) / 4 for row in trace.given["lines"]]
    return {round(row["reward"] / r, 5) for row, r in zip(trace.given["lines"], own, strict=True) if r}


ALONE: Options = JUDGED | {"reward_function": None}

EVAL: dict[str, Probe] = {
    **own_layout_probes("reward", "reward_pretrain", several=True, beside=False, **JUDGED),
    **{name: MODELS[name] for name in ("reward_pretrain", "reward_num_gpus_per_node", "gpu_memory_gib")},
    "micro_batch_size": Probe(value=1, seen=lambda t: t.engine("reward").packing.max_tokens, expected=32, also=JUDGED),
    "normalize_reward": Probe(  # a score of 0.2, with mean 0.5 and std 2
        value=True, seen=lambda t: round(*metrics("eval/reward_mean")(t), 5), expected=-0.15, also=ALONE
    ),
    **{n: replace(p, also=renamed(p.also)) for n, p in GENERATE.items() if n not in NOT_HERE.split()},
    **{name: Probe(value=value, seen=sampled(name), also=TWO) for name, value in DRAWN.items()},
    **{name: SCORE[name] for name in REWARD if name not in ("reward_skip_special_tokens", "reward_weights")},
    "reward_weights": Probe(value=(10.0, 0.5), seen=weights, expected={10.5}, also={"reward_rule": "exact_match"}),
    "reward_skip_special_tokens": Probe(
        value=False,
        seen=lambda t: {s.response_text.endswith("</s>") for s in t.given["scored"][0] if s.finish_reason == "stop"},
        expected={True},
    ),
    "eval_data": Probe(
        value="{}/other_eval.jsonl,mine={}/eval.jsonl",
        seen=both(of("set"), has, lines(len)),
        expected=({"other_eval", "mine"}, ["eval/accuracy", "eval/mine/accuracy", "eval/other_eval/accuracy"], 5),
    ),
    "eval_split": Probe(value="other", seen=of("input", 2), expected={"ot"}, also={"eval_data": "{}/splits"}),
    "eval_n_samples_per_prompt": Probe(
        value=3,
        seen=both(lines(len), lambda t: None not in metrics("eval/pass@1", "eval/pass@2", "eval/pass@3")(t)),
        expected=(8 + 24, True),
    ),
    "eval_temperature": Probe(value=0.35, seen=sampled("temperature"), also=TWO),
    "output": Probe(value="{}/elsewhere.json", seen=lambda t: t.given["output"][0][-14:], expected="elsewhere.json"),
    "responses": Probe(
        value="{}/others.jsonl", seen=both(lambda t: t.given["path"][0][-12:], lines(len)), expected=("others.jsonl", 8)
    ),
}
