"""Every option of `megarlhf sft`, `rm`, `prm` and `parity`: what it is set to, and where a run shows it."""

from dataclasses import replace

import numpy as np

from tests.config.in_process import Trace
from tests.config.in_process_programs import TEMPLATE
from tests.config.option_probes import (
    LORA,
    Options,
    Probe,
    Seen,
    adam,
    best_probes,
    both,
    kernel_probes,
    layout_probes,
    linked,
    megatron_probe,
    metric,
    optimizer_probes,
    refused,
    steps_with,
    transformer,
    world,
)
from tests.config.option_probes_precision import precision_probes


def given(what: str, name: str) -> Seen:
    """An argument of the first call of a constructor or function."""
    return lambda trace: trace.given[what][0][name]


def sft_ranks(number: int) -> Options:
    """Ranks of a supervised run."""
    return {"num_gpus_per_node": number}


def rows(trace: Trace) -> list[tuple[int, ...]]:
    """What was trained on, step by step."""
    batches = trace.given["rows actor"]
    parts = [np.split(batch.input_ids, np.cumsum(batch.lengths)[:-1]) for batch in batches]
    return [tuple(ids.tolist()) for part in parts for ids in part]


def decoded(trace: Trace) -> set[str]:
    """The same as text, one character a token; special tokens as dots."""
    letters = "...." + "0123456789abcdefghijklmnopqrstuvwxyz ="
    return {"".join(letters[token] for token in ids) for ids in rows(trace)}


def targets(trace: Trace) -> set[int]:
    """Tokens without a loss at the start of each row."""
    return {length for batch in trace.given["rows actor"] for length in batch.prompt_lengths.tolist()}


MODEL = {
    "pretrain": Probe(value="{}/other", seen=lambda t: t.engine().pretrain.name, expected="other"),
    "tokenizer": Probe(
        value="{}/tokenizer",
        seen=lambda t: str(t.given["export"][0]["tokenizer"]).rsplit("/", 1)[1],
        **{"expected": "tokenizer", "before": {"tokenizer": "{}/other"}},
    ),
    "bf16": Probe(value=True, seen=both(transformer("bf16"), adam("bf16")), expected=(True, True)),
    "moe_aux_loss_coeff": Probe(
        value=0.077,
        seen=both(transformer("moe_aux_loss_coeff"), transformer("moe_router_load_balancing_type")),
        **{"expected": (0.077, "aux_loss"), "also": {"pretrain": "{}/experts"}},
    ),
    "seed": Probe(value=1234, seen=both(world("seed"), transformer("drawn_from")), expected=(1234, 1234)),
}
BATCH = {
    "train_iters": Probe(value=5, seen=lambda t: len(t.given["metrics"]), expected=5),
    "max_epochs": Probe(value=3, seen=lambda t: len(t.given["metrics"]), expected=6, also={"train_iters": None}),
    "global_batch_size": Probe(value=6, seen=lambda t: len(t.given["rows actor"][0]), expected=6),
    "micro_batch_size": Probe(value=1, seen=lambda t: t.engine().packing.max_tokens, expected=32),
    "max_tokens_per_micro_batch": Probe(value=40, seen=lambda t: t.engine().packing.max_tokens),
    "logprob_chunk_tokens": Probe(value=77, seen=lambda t: t.engine()._outputs.keywords["distribution"].chunk_tokens),
    "max_len": Probe(
        value=6,
        seen=both(lambda t: t.engine().packing.max_tokens, lambda t: max(map(len, rows(t)))),
        **{"expected": (48, 6), "also": {"dataset": "{}/ragged.jsonl"}},
    ),
}
CHATS: Options = {
    **{"dataset": "{}/turns.jsonl", "eval_dataset": "{}/turns.jsonl", "output_key": None},
    **{"apply_chat_template": True, "tokenizer": "{}/chat"},
}
NO_ROWS = {"dataset": "", "eval_dataset": None, "output_key": None, "pretrain_mode": True, "max_len": 8}
INDEXED = NO_ROWS | {"data_path": ("{}/even",)}
DATA = {
    "dataset": Probe(value="{}/other_rows.jsonl", seen=lambda t: {x[0] for x in decoded(t)}, expected={"o"}),
    "eval_dataset": Probe(value="{}/other_eval.jsonl", seen=lambda t: t.given["evaluated actor"][0], expected=3),
    "dataset_probs": Probe(
        value="0.2,0.8",
        seen=lambda t: len(decoded(t)) < 14,
        **{"expected": True, "also": {"dataset": "{}/rows.jsonl,{}/other_rows.jsonl", "train_iters": 4}},
    ),
    "train_split": Probe(
        value="other",
        seen=lambda t: {x[:2] for x in decoded(t)},
        **{"expected": {"ot"}, "also": {"dataset": "{}/splits"}},
    ),
    "eval_split": Probe(
        value="0.25",
        seen=both(lambda t: t.given["evaluated actor"][0], lambda t: len(decoded(t))),
        **{"expected": (2, 6), "also": {"eval_dataset": None}},
    ),
    "input_key": Probe(value="question", seen=lambda t: {x[:3] for x in decoded(t)}, expected={"ask"}),
    "output_key": Probe(value="answer", seen=lambda t: {x[4:5] for x in decoded(t)}, expected={" "}),
    "apply_chat_template": Probe(
        value=True,
        seen=lambda t: {x[:2] for x in decoded(t)},
        **{"expected": {"q "}, "also": {"tokenizer": "{}/chat"}},
    ),
    "input_template": Probe(value="say {}", seen=lambda t: {x[:4] for x in decoded(t)}, expected={"say "}),
    "tokenizer_chat_template": Probe(
        value=TEMPLATE.replace("q ", "z "),
        seen=both(lambda t: {x[:2] for x in decoded(t)}, given("export", "chat_template")),
        **{"expected": ({"z "}, TEMPLATE.replace("q ", "z ")), "also": {"apply_chat_template": True}},
        before={"tokenizer_chat_template": TEMPLATE},
    ),
    "pretrain_mode": Probe(value=True, seen=targets, expected={1}),
    "data_cache_path": Probe(value="{}/cache", seen=lambda t: t.said.count("tokenized data of "), expected=2),
    "multiturn": Probe(
        value=True,
        seen=lambda t: {number for batch in t.given["rows actor"] for number in batch.num_loss_targets.tolist()},
        **{"expected": {len("q 2 aq 4 a.")}, "also": CHATS},
    ),
    "data_path": Probe(
        value=("2", "{}/even", "1", "{}/odd"),
        seen=lambda t: [sum(int(ids[0]) % 2 for ids in rows(t)[: 4 * n]) for n in (1, 3)],
        **{"expected": [1, 4], "also": NO_ROWS | {"split": "1,0,0"}},
        before={"data_path": ("{}/even",)},
    ),
    "split": Probe(
        value="7,3,0",
        seen=lambda t: t.given["evaluated actor"][0],
        **{"expected": 4, "also": INDEXED | {"eval_iters": 1}},
        before={"split": "1,0,0"},
    ),
    "eval_iters": Probe(
        value=2,
        seen=lambda t: sum(t.given["evaluated actor"]),
        **{"expected": 8, "also": INDEXED | {"split": "1,1,0"}},
        before={"eval_iters": 1},
    ),
    "max_samples": Probe(value=3, seen=lambda t: len(decoded(t)), expected=3),
}


def logging_probes(program: str) -> dict[str, Probe]:
    """Options of the run directory and of what is logged."""
    place, first = f"elsewhere_{program}", f"{{}}/first_{program}"
    found = dict(LOGGING)
    found["save"] = Probe(
        value="{}/" + place, seen=lambda t: t.given["export"][0]["directory"].parent.name, expected=place
    )
    found["load"] = replace(LOGGING["load"], value=first)
    found["load_checkpoint"] = replace(LOGGING["load_checkpoint"], also={"save": f"{{}}/again_{program}"})
    found["ckpt_path"] = replace(LOGGING["ckpt_path"], value=f"{{}}/checkpoints_{program}")
    found["no_load_optim"] = replace(LOGGING["no_load_optim"], also=LOGGING["no_load_optim"].also | {"load": first})
    found["eval_interval"] = replace(LOGGING["eval_interval"], seen=steps_with(f"{program}/eval_loss"))
    found |= best_probes(f"{program}/eval_{'reward_mean' if program == 'rm' else 'loss'}")
    return found


LOGGING = {
    "load": Probe(
        value="{}/first_sft",
        seen=both(lambda t: [path.name for path, _ in t.given["load"]], lambda t: t.given["metrics"][0]["step"]),
        **{"expected": (["actor"], 4), "also": {"train_iters": 4}},
    ),
    "load_checkpoint": Probe(
        value=True,
        seen=lambda t: [path.name for path, _ in t.given["load"]],
        **{"expected": ["actor"], "also": {"save": "{}/again_sft"}},
    ),
    "ckpt_path": Probe(value="{}/checkpoints_sft", seen=linked, expected=(True, ["iter_0000003"])),
    "no_load_optim": Probe(
        value=True,
        seen=lambda t: {with_optimizer for _, with_optimizer in t.given["load"]},
        **{"expected": {False}, "also": {"train_iters": 4, "load": "{}/first_sft"}},
    ),
    "save_interval": Probe(value=2, seen=lambda t: t.given["checkpoints"], expected=["iter_0000002", "iter_0000003"]),
    "eval_interval": Probe(value=1, seen=steps_with("eval_loss"), expected=[1, 2, 3]),
    **best_probes("sft/eval_loss"),
    "log_interval": Probe(
        value=2, seen=lambda t: [f"step {n}/3" in t.said for n in (1, 2, 3)], expected=[False, True, True]
    ),
    "max_ckpt_num": Probe(
        value=2,
        seen=lambda t: t.given["checkpoints"],
        **{"expected": ["iter_0000002", "iter_0000003"], "also": {"save_interval": 1}},
    ),
    "max_ckpt_mem": Probe(
        value=1e-9,
        seen=lambda t: t.given["checkpoints"],
        **{"expected": ["iter_0000003"], "also": {"save_interval": 1}},
    ),
    "use_tensorboard": Probe(
        value=True, seen=lambda t: [x["directory"].name for x in t.given["tensorboard"]], expected=["tensorboard"]
    ),
    "use_wandb": Probe(value=True, seen=lambda t: len(t.given["wandb"]), expected=1),
    "wandb_project": Probe(value="other", seen=given("wandb", "project"), also={"use_wandb": True}),
    "wandb_run_name": Probe(value="mine", seen=given("wandb", "run_name"), also={"use_wandb": True}),
    "wandb_org": Probe(value="team", seen=given("wandb", "entity"), also={"use_wandb": True}),
    "wandb_group": Probe(value="runs", seen=given("wandb", "group"), also={"use_wandb": True}),
}


def shared_probes(program: str) -> dict[str, Probe]:
    """Options of every supervised program but those of its data and its loss."""
    return {
        **(MODEL | layout_probes("actor", sft_ranks) | kernel_probes("actor") | BATCH | megatron_probe("actor")),
        **(optimizer_probes("actor") | logging_probes(program) | LORA | precision_probes("actor")),
        "num_gpus_per_node": Probe(
            value=2,
            seen=both(lambda t: t.given["ranks"][0]["world_size"], world("world_size"), world("rank")),
            expected=(2, 2, 1),
        ),
        "host_memory_gib": Probe(value=0.0001, seen=lambda t: "host_memory_gib=0.0001; " in t.error, expected=True),
        "gpu_memory_gib": Probe(value=0.001, seen=lambda t: "gpu_memory_gib=0.001; " in t.error, expected=True),
        "enable_ema": Probe(
            value=True,
            seen=lambda t: [export["directory"].name for export in t.given["export"]],
            expected=["hf", "hf_ema"],
        ),
        "ema_decay": Probe(
            value=0.75, seen=lambda t: t.given["ema"], **{"expected": [0.75], "also": {"enable_ema": True}}
        ),
        "learning_rate": Probe(
            value=7.3e-4, seen=both(adam("lr"), metric(f"{program}/learning_rate", 1)), **{"expected": (7.3e-4, 7.3e-4)}
        ),
    }


SFT = shared_probes("sft") | DATA
OF_CHATS_AND_TEXTS = ("multiturn", "data_path", "split", "eval_iters")  # that pairs, labels and steps are not
# Its one row has none of the columns that the others ask for, which names the file that was chosen.
OTHER_SPLIT = replace(DATA["train_split"], seen=lambda t: "splits/other-00000" in t.error, expected=True)


def scalars(trace: Trace) -> set[float]:
    """Margins that the loss asked for."""
    return {value for batch in trace.given["rows actor"] for value in batch.scalars.get("margin", [0.0])}


RM = {
    **(shared_probes("rm") | DATA),
    "micro_batch_size": Probe(value=3, seen=lambda t: t.engine().packing.max_tokens, expected=6 * 32),
    "global_batch_size": Probe(value=6, seen=lambda t: len(t.given["rows actor"][0]), expected=12),
    "max_len": replace(BATCH["max_len"], value=8, expected=(16, 9), also={"dataset": "{}/ragged_pairs.jsonl"}),
    "max_tokens_per_micro_batch": Probe(value=80, seen=lambda t: t.engine().packing.max_tokens),
    "share_prompt_prefix": Probe(value=False, seen=lambda t: t.engine().packing.share_prefix),
    "dataset": replace(DATA["dataset"], value="{}/other_pairs.jsonl"),
    "eval_dataset": replace(DATA["eval_dataset"], value="{}/other_pairs_eval.jsonl", expected=6),
    "prompt_key": DATA["input_key"],
    "chosen_key": Probe(value="better", seen=lambda t: {x[3] for x in decoded(t)}, expected={"b", "r"}),
    "rejected_key": Probe(value="worse", seen=lambda t: {x[3] for x in decoded(t)}, expected={"c", "w"}),
    "margin_loss": Probe(value=True, seen=scalars, expected={i / 4 for i in range(8)}),
    "value_head_prefix": Probe(value="value_head", seen=refused("value_head_prefix=value_head is not"), expected=True),
}
for name in ("input_key", "output_key", "pretrain_mode", *OF_CHATS_AND_TEXTS):
    del RM[name]
RM["train_split"] = OTHER_SPLIT
RM["eval_split"] = replace(DATA["eval_split"], expected=(4, 12))
RM["dataset_probs"] = replace(
    DATA["dataset_probs"],
    seen=lambda t: len(decoded(t)) < 28,
    also={"dataset": "{}/pairs.jsonl,{}/other_pairs.jsonl", "train_iters": 4},
)
RM["max_samples"] = Probe(value=3, seen=lambda t: len(decoded(t)), expected=6)


def judged(trace: Trace) -> set[int]:
    """Tokens at which the loss looks."""
    found = set()
    for batch in trace.given["rows actor"]:
        inputs = np.delete(batch.input_ids, np.cumsum(batch.lengths) - 1)
        found |= set(inputs[batch.loss_mask].tolist())
    return found


def labels(trace: Trace) -> set[tuple[float, ...]]:
    """Labels of all steps."""
    fields = [batch.fields["shares"][batch.loss_mask] for batch in trace.given["rows actor"]]
    return {tuple(row) for field in fields for row in field.tolist()}


PRM = {
    **(shared_probes("prm") | DATA),
    "micro_batch_size": Probe(value=3, seen=lambda t: t.engine().packing.max_tokens, expected=3 * 32),
    "max_len": replace(BATCH["max_len"], expected=(6, 6), also={"dataset": "{}/ragged_steps.jsonl"}),
    "dataset": replace(DATA["dataset"], value="{}/other_steps.jsonl"),
    "eval_dataset": replace(DATA["eval_dataset"], value="{}/other_steps_eval.jsonl"),
    "tokenizer_chat_template": replace(
        DATA["tokenizer_chat_template"],
        value=TEMPLATE.replace("q ", "x "),  # z is the placeholder
        expected=({"x "}, TEMPLATE.replace("q ", "x ")),
    ),
    "label_key": Probe(value="answer", seen=labels, expected={(0.0, 1.0)}),
    "placeholder_token": Probe(value="=", seen=judged, expected={41}),
    "reward_tokens": Probe(value=("n", "y"), seen=labels, expected={(0.0, 1.0)}),
}
for name in ("output_key", "pretrain_mode", *OF_CHATS_AND_TEXTS):
    del PRM[name]
PRM["train_split"] = OTHER_SPLIT
PRM["dataset_probs"] = replace(
    DATA["dataset_probs"], also={"dataset": "{}/steps.jsonl,{}/other_steps.jsonl", "train_iters": 4}
)


def nothing(number: int) -> Options:
    """Parity works out its ranks from the layout."""
    return {}


def verdicts(trace: Trace) -> tuple[int, int]:
    """Quantities within their tolerance, and past it."""
    return trace.said.count(" ok\n"), trace.said.count("PAST ITS TOLERANCE")


PARITY = {
    "pretrain": Probe(
        value="{}/other",
        seen=lambda t: [t.engine(phase).pretrain.name for phase in ("reference", "layout")],
        expected=["other", "other"],
    ),
    "tokenizer": Probe(value="{}/tokenizer", seen=refused("tokenizer", "is ignored"), expected=True),
    "bf16": Probe(
        value=True,
        seen=lambda t: [t.engine(phase).config.bf16 for phase in ("reference", "bf16", "layout")],
        expected=[False, True, True],
    ),
    "moe_aux_loss_coeff": Probe(
        value=0.077, seen=refused("moe_aux_loss_coeff=0.077 cannot be compared"), expected=True
    ),
    "seed": Probe(
        value=1234,
        seen=both(
            world("seed", "reference"),
            world("seed", "layout"),
            transformer("drawn_from", "layout"),
            given("rows", "seed"),
        ),
        expected=(1234, 1234, 1234, 1234),
    ),
    **layout_probes("layout", nothing),
    **kernel_probes("layout"),
    **megatron_probe("layout"),
    "num_gpus_per_node": Probe(
        value=3,
        seen=both(lambda t: t.given["ranks"], world("world_size", "layout")),
        expected=([("reference", 1), ("layout", 3)], 3),
    ),
    "objectives": Probe(
        value=("critic",), seen=lambda t: t.given["engines"], expected=[("reference", "value"), ("layout", "value")]
    ),
    "num_groups": Probe(value=5, seen=given("rows", "groups")),
    "longest": Probe(value=17, seen=given("rows", "longest")),
    "max_tokens_per_micro_batch": Probe(
        value=77,
        seen=lambda t: [t.engine(phase).packing.max_tokens for phase in ("reference", "layout")],
        expected=[77, 77],
    ),
    "share_prompt_prefix": Probe(
        value=True,
        seen=lambda t: [t.engine(phase).packing.share_prefix for phase in ("reference", "layout")],
        expected=[False, True],
    ),
    "tolerance": Probe(value=0.25, seen=verdicts, expected=(3, 3)),
}
