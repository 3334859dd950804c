"""Options of `megarlhf ppo` beyond the plain algorithm."""

from tests.config.in_process import Trace
from tests.config.option_probes import Probe, both, metric


def documents(trace: Trace) -> list[list[int]]:
    """Tokens of the pretraining data that were drawn, each document once, without its EOS."""
    found = set()
    for batch in (batch for term in trace.given["beside actor"] for batch in term.batches):
        for first, length in zip(batch.places.positions.tolist(), batch.places.lengths.tolist(), strict=True):
            found.add(tuple(batch.tokens[first : first + length].tolist()))
    return sorted(map(list, found))


def exports(trace: Trace) -> list[str]:
    """Directories of what is exported."""
    return [given["directory"].name for given in trace.given["export"]]


def steps(trace: Trace) -> list[int]:
    """Steps that were logged after the start."""
    return [row["step"] for row in trace.given["metrics"]][1:]


def cut(trace: Trace) -> int:
    """Samples of both steps that ended at the length limit."""
    return sum(s.finish_reason == "length" for samples in trace.given["scored"][1:3] for s in samples)


def sum_of_rows(trace: Trace) -> int:
    """Samples that the actor's passes looked at."""
    return sum(rows for rows, _ in trace.given["forward actor"][::2])


PTX = {"pretrain_data": "{}/other_rows.jsonl"}
TRICKS: dict[str, Probe] = {
    "num_episodes": Probe(value=3, seen=steps, **{"expected": [1, 2, 3, 4, 5, 6], "also": {"train_iters": None}}),
    "overlong_filter": Probe(
        value=True,
        seen=lambda t: cut(t) > 0 and sum_of_rows(t) == 16 - cut(t),
        **{"expected": True, "also": {"generate_max_len": 5}},
    ),
    "overlong_buffer_len": Probe(
        value=4, seen=lambda t: (metric("reward/overlong_penalty", 1)(t) or 0) < 0, **{"expected": True}
    ),
    "overlong_penalty_factor": Probe(
        value=8.0,
        seen=lambda t: round(metric("reward/overlong_penalty", 1)(t) * 8 % 8, 6),
        **{"expected": 0.0, "also": {"overlong_buffer_len": 1, "generate_max_len": 5}},
    ),
    "dynamic_filtering": Probe(value=True, seen=lambda t: metric("rollout/filter_rounds", 1)(t), expected=1.0),
    "dynamic_filtering_reward_range": Probe(
        value=(5.0, 6.0),
        seen=both(metric("rollout/filter_rounds", 1), metric("reward/untrained_steps", 1)),
        expected=(3.0, 1.0),
        also={"dynamic_filtering": True, "dynamic_filtering_max_rounds": 3},
    ),
    "dynamic_filtering_max_rounds": Probe(
        value=2,
        seen=metric("rollout/filter_rounds", 1),
        **{"expected": 2.0, "also": {"dynamic_filtering": True, "dynamic_filtering_reward_range": (5.0, 6.0)}},
    ),
    "enable_ema": Probe(value=True, seen=exports, expected=["hf", "hf_ema"]),
    "ema_decay": Probe(
        value=0.75, seen=lambda t: t.given["ema"], **{"expected": [0.75], "also": {"enable_ema": True}}
    ),
    "save_value_network": Probe(value=True, seen=exports, expected=["hf", "hf_critic"]),
    "pretrain_data": Probe(
        value="{}/other_rows.jsonl",
        seen=both(
            lambda t: len(t.given["beside actor"]),
            lambda t: len(documents(t)),
            lambda t: metric("policy/ptx_loss", 1)(t) is not None,
        ),
        expected=(4, 6, True),
    ),
    "pretrain_data_probs": Probe(
        value="0.1,0.9",
        seen=lambda t: any("of 8 rows of" in said for said in t.warnings),
        **{"expected": True, "also": {"pretrain_data": "{}/rows.jsonl,{}/other_rows.jsonl"}},
    ),
    "pretrain_split": Probe(
        value="test",
        seen=lambda t: len(documents(t)[0]) == len("te split"),
        **{"expected": True, "also": {"pretrain_data": "{}/splits"}, "before": {"pretrain_split": "none"}},
    ),
    "ptx_coef": Probe(
        value=0.3, seen=lambda t: {term.coef for term in t.given["beside actor"]}, **{"expected": {0.3}, "also": PTX}
    ),
}
