"""Every option of `megarlhf dpo` and `megarlhf kto`: those of `megarlhf sft`, in pairs, and their own."""

import math
from dataclasses import replace
from pathlib import Path

from tests.config.in_process import Trace
from tests.config.option_probes import Probe, adam, best_probes, both, metric, steps_with
from tests.config.option_probes_rest import OF_CHATS_AND_TEXTS, OTHER_SPLIT, SFT, decoded, rows

STEP_TWO = 0.016  # log-ratio in step 2 of an answer of four tokens: the first step has moved each by 0.004


def shared(name: str, *, without: str) -> dict[str, Probe]:
    """SFT's probes under another program's names, but for some options."""

    def own(probe: Probe) -> Probe:
        also = {key: renamed(value) for key, value in probe.also.items()}
        return replace(probe, also=also, value=renamed(probe.value))

    def renamed(value: object) -> object:
        return value.replace("_sft", f"_{name}") if isinstance(value, str) else value

    left_out = (*without.split(), *OF_CHATS_AND_TEXTS)
    kept = {option: own(probe) for option, probe in SFT.items() if option not in left_out}
    return kept | {
        "train_split": OTHER_SPLIT,
        "save": replace(kept["save"], value=f"{{}}/elsewhere_{name}", expected=f"elsewhere_{name}"),
        "load": replace(kept["load"], value=f"{{}}/first_{name}"),
        **best_probes(f"{name}/eval_{'margin' if name == 'dpo' else 'desirable_reward'}"),
        "eval_interval": replace(kept["eval_interval"], seen=steps_with(f"{name}/eval_loss")),
        "learning_rate": replace(kept["learning_rate"], seen=both(adam("lr"), metric(f"{name}/learning_rate", 1))),
    }


def cached(trace: Trace) -> list[bool]:
    """Whether a reference is kept, and whether log-probs of one lie beside the run."""
    directory = Path(trace.given["directory"][0])
    return [trace.engine()._reference is not None, any(directory.parent.glob("ref_log_probs-*.npy"))]


def reward(name: str, beta: float) -> Probe:
    """beta, from the reward of answers of four tokens."""
    found = metric(name, 2)
    return Probe(value=beta, seen=lambda trace: round(found(trace) / STEP_TWO, 4))


def loss(trace: Trace, step: int, name: str = "dpo") -> float:
    """Of a step."""
    return float(metric(f"{name}/loss", step)(trace))


def nll_coef(trace: Trace) -> float:
    """nll_loss_coef, from the first step, whose chosen answers are of one length."""
    return round((loss(trace, 1) - math.log(2)) / -metric("dpo/chosen_log_prob", 1)(trace), 4)


def weights(trace: Trace) -> tuple[float, float]:
    """The weights of labels, from the losses of the first steps, where each row's is half its weight at first."""
    desirable = trace.given["rows actor"][0].scalars["desirable"].sum()
    assert 0 < desirable < 4
    return round(8 * loss(trace, 1, "kto"), 4), desirable


def labels(trace: Trace) -> set[tuple[str, float]]:
    """The label of each row, by its number."""
    flat = [float(label) for batch in trace.given["rows actor"] for label in batch.scalars["desirable"]]
    return {("0123456789"[ids[2] - 4], label) for ids, label in zip(rows(trace), flat, strict=True)}


def column(where: slice) -> Probe:
    """A column of questions in the place of answers."""
    return Probe(value="question", seen=lambda t: any(x[where] == "ask" for x in decoded(t)), expected=True)


SMOOTHED = round(math.log1p(math.exp(-10 * STEP_TWO / 2)) + 0.2 * 10 * STEP_TWO / 2, 4)
_SHARED = shared("dpo", without="input_key output_key pretrain_mode")
DPO = _SHARED | {
    **{
        name: replace(_SHARED[name], expected=twice)
        for name, twice in (
            ("global_batch_size", 12),
            ("eval_dataset", 6),
            ("micro_batch_size", 64),
            ("max_samples", 6),
        )
    },
    "dataset_probs": replace(_SHARED["dataset_probs"], seen=lambda t: len(decoded(t)) < 28),
    "eval_split": replace(_SHARED["eval_split"], expected=(4, 12)),
    "max_len": replace(SFT["max_len"], value=7, expected=(112, 7)),
    "max_tokens_per_micro_batch": replace(SFT["max_tokens_per_micro_batch"], value=80),
    "share_prompt_prefix": Probe(value=False, seen=lambda t: t.engine().packing.share_prefix),
    "prompt_key": Probe(value="question", seen=lambda t: {x[:3] for x in decoded(t)}, expected={"ask"}),
    "chosen_key": column(slice(3, 6)),
    "rejected_key": column(slice(3, 6)),
    "beta": reward("dpo/chosen_reward", 0.5),
    "ipo": Probe(value=True, seen=lambda t: round(loss(t, 1), 3), expected=25.0),
    "label_smoothing": Probe(
        value=0.2, seen=lambda t: round(loss(t, 2), 4), **{"expected": SMOOTHED, "also": {"beta": 10.0}}
    ),
    "nll_loss_coef": Probe(value=0.7, seen=nll_coef),
    "ref_pretrain": Probe(value="{}/other", seen=lambda t: t.engine().weights.loaded, expected=["model", "other"]),
    "ref_offload": Probe(value=False, seen=lambda t: t.engine().memory.is_awake("reference"), expected=True),
    "precompute_ref_log_probs": Probe(value=True, seen=cached, expected=[False, True]),
}
KTO = shared("kto", without="pretrain_mode") | {
    "max_len": replace(SFT["max_len"], value=7, expected=(56, 7)),
    "output_key": column(slice(3, 6)),
    "label_key": Probe(
        value="unwanted", seen=labels, expected={(str(number), float(1 - number % 4 // 2)) for number in range(8)}
    ),
    "beta": reward("kto/desirable_reward", 0.5),
    "desirable_loss_weight": Probe(
        value=3.0, seen=lambda t: round((weights(t)[0] - 4) / weights(t)[1], 3), expected=2.0
    ),
    "ref_offload": Probe(value=False, seen=lambda t: t.engine().memory.is_awake("reference"), expected=True),
    "undesirable_loss_weight": Probe(
        value=3.0, seen=lambda t: round((weights(t)[0] - 4) / (4 - weights(t)[1]), 3), expected=2.0
    ),
}
