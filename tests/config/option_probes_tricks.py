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


PTX = {"pretrain_data": "{}/other_rows.jsonl"}
TRICKS: dict[str, Probe] = {
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
