"""Every option of `megarlhf generate`, `score` and `select`: what it is set to, and where a run shows it."""

from collections.abc import Callable
from typing import Any

from megarlhf.rollout.engine import request_seed
from tests.config.in_process import Trace
from tests.config.in_process_programs import TEMPLATE
from tests.config.option_probes import Options, Probe, Seen, both, own_layout_probes, refused, transformer, world
from tests.config.option_probes_ppo import JUDGED, REWARD, llm


def lines(look: Callable[[list[dict[str, Any]]], Any]) -> Seen:
    """Of the file that is written."""
    return lambda trace: look(trace.given["lines"])


def of(key: str, end: int | None = None) -> Seen:
    """The values that a column has."""
    return lines(lambda rows: {str(row[key])[:end] for row in rows})


def sampling(name: str) -> Seen:
    """A field of the first response's SamplingParams."""
    return lambda trace: getattr(trace.llms[0].parameters[0][0], name)


def longest_prompt(trace: Trace) -> int:
    """Tokens, each of which is a character."""
    return max(map(len, trace.llms[0].prompts))


GENERATE: dict[str, Probe] = {
    "pretrain": Probe(value="{}/other", seen=lambda t: t.llms[0].options["model"].rsplit("/", 1)[1], expected="other"),
    "tokenizer": Probe(
        value="{}/tokenizer",
        seen=lambda t: t.given["engine's tokenizer"][0].rsplit("/", 1)[1],
        expected="tokenizer",
    ),
    "bf16": Probe(value=True, seen=llm("dtype"), expected="bfloat16"),
    "seed": Probe(value=1234, seen=both(llm("seed"), sampling("seed")), expected=(1234, request_seed(1234, 0, 0, 0))),
    "vllm_num_engines": Probe(value=3, seen=lambda t: len(t.llms)),
    "vllm_tensor_parallel_size": Probe(value=2, seen=llm("tensor_parallel_size")),
    "start_timeout_seconds": Probe(value=71.0, seen=lambda t: round(t.waits[0]), expected=71),
    "phase_timeout_seconds": Probe(value=1717.0, seen=lambda t: round(t.waits[-1]), expected=1717),
    "prompt_max_len": Probe(value=5, seen=lines(len), also={"prompt_data": "{}/ragged.jsonl"}),
    "generate_max_len": Probe(value=3, seen=sampling("max_tokens")),
    "temperature": Probe(value=0.7, seen=sampling("temperature")),
    "top_p": Probe(value=0.9, seen=sampling("top_p")),
    "top_k": Probe(value=50, seen=sampling("top_k")),
    "min_p": Probe(value=0.05, seen=sampling("min_p")),
    "repetition_penalty": Probe(value=1.3, seen=sampling("repetition_penalty")),
    "max_num_seqs": Probe(value=13, seen=llm("max_num_seqs")),
    "vllm_gpu_memory_utilization": Probe(value=0.66, seen=llm("gpu_memory_utilization")),
    "vllm_kv_cache_gib": Probe(value=0.25, seen=llm("kv_cache_memory_bytes"), expected=2**28),
    "enforce_eager": Probe(value=False, seen=llm("enforce_eager")),
    "prompt_data": Probe(value="{}/other_rows.jsonl", seen=of("input", 1), expected={"o"}),
    "prompt_data_probs": Probe(
        value="0.1,0.9", seen=lines(lambda rows: len(rows) < 14), expected=True,
        also={"prompt_data": "{}/rows.jsonl,{}/other_rows.jsonl"},
    ),  # fmt: skip
    "prompt_split": Probe(value="other", seen=of("input", 2), expected={"ot"}, also={"prompt_data": "{}/splits"}),
    "input_key": Probe(value="question", seen=of("input", 3), expected={"ask"}),
    "label_key": Probe(value="answer", seen=lines(lambda rows: [len(row["label"]) for row in rows][0]), expected=3),
    "apply_chat_template": Probe(value=True, seen=of("input", 2), expected={"q "}, also={"tokenizer": "{}/chat"}),
    "input_template": Probe(value="say {} now", seen=of("input", 4), expected={"say "}),
    "tokenizer_chat_template": Probe(
        value=TEMPLATE.replace("q ", "z "), seen=of("input", 2), expected={"z "},
        also={"apply_chat_template": True}, before={"tokenizer_chat_template": TEMPLATE},
    ),  # fmt: skip
    "max_samples": Probe(value=3, seen=lines(len)),
    "output": Probe(value="{}/elsewhere.jsonl", seen=lambda t: t.given["path"][0][-15:], expected="elsewhere.jsonl"),
    "n_samples_per_prompt": Probe(value=3, seen=lines(lambda r: [row["sample"] for row in r[1:4]]), expected=[1, 2, 0]),
    "greedy": Probe(value=True, seen=sampling("temperature"), expected=0.0),
    "iter": Probe(
        value=1, seen=lines(lambda rows: [row["index"] for row in rows]), expected=[5, 6, 7, 0, 1],
        also={"rollout_batch_size": 5},
    ),  # fmt: skip
    "rollout_batch_size": Probe(
        value=5, seen=lines(lambda rows: [row["index"] for row in rows]), expected=[5, 6, 7, 0, 1],
        also={"iter": 1}, before={"rollout_batch_size": 2},
    ),  # fmt: skip
    "enable_csft": Probe(value=True, seen=longest_prompt, expected=len("r 0 <rm_score>: 5.00 ")),
    "csft_prompt": Probe(value="a", seen=longest_prompt, expected=len("r 0 a "), also={"enable_csft": True}),
    "skip_special_tokens": Probe(
        value=False, seen=lines(lambda rows: {row["stop_text"] for row in rows if row["finish_reason"] == "stop"}),
        expected={"</s>"},
    ),  # fmt: skip
    "vllm": Probe(value=(("block_size", 16),), seen=lambda t: t.llms[0].options["block_size"], expected=16),
}


def scored(look: Callable[[Any], Any]) -> Seen:
    """Of the samples that the sources were given."""
    return lambda trace: [look(sample) for samples in trace.given["scored"] for sample in samples]


MODELS: dict[str, Probe] = {
    **own_layout_probes("reward", "reward_pretrain", several=True, beside=False, **JUDGED),
    "reward_pretrain": Probe(
        value="{}/rm,{}/rm",
        seen=lambda t: [t.engine(role).pretrain.name for role in ("reward_0", "reward_1")],
        expected=["rm", "rm"],
    ),
    "reward_num_gpus_per_node": Probe(value=3, seen=world("world_size", "reward"), also=JUDGED),
    "bf16": Probe(value=True, seen=transformer("bf16", "reward"), also=JUDGED),
    "max_len": Probe(
        value=5, seen=lines(lambda rows: {row["reward"] for row in rows}), **{"expected": {None}, "also": JUDGED}
    ),
    "micro_batch_size": Probe(
        value=1,
        seen=lambda t: t.engine("reward").packing.max_tokens,
        **{"expected": 64, "also": JUDGED | {"max_len": 64}},
    ),
    "normalize_reward": Probe(
        value=True, seen=lines(lambda rows: round(rows[1]["reward"], 5)), **{"expected": 1.0, "also": JUDGED}
    ),
    "start_timeout_seconds": Probe(value=71.0, seen=lambda t: round(t.waits[0]), **{"expected": 71, "also": JUDGED}),
    "phase_timeout_seconds": Probe(
        value=1717.0, seen=lambda t: round(t.waits[-1]), **{"expected": 1717, "also": JUDGED}
    ),
    "gpu_memory_gib": Probe(
        value=0.001, seen=lambda t: "gpu_memory_gib=0.001; " in t.error, **{"expected": True, "also": JUDGED}
    ),
    "reward_weights": Probe(
        value=(10.0, 0.5),
        seen=lines(lambda rows: round(rows[1]["reward"], 5)),
        **{"expected": 0.625, "also": JUDGED},
    ),
}
LOST: Options = {"reward_function": None, "reward_rule": "format", "reward_format": "0.5"}
SCORE: dict[str, Probe] = {
    "dataset": Probe(value="{}/other_rows.jsonl", seen=lines(len), expected=6),
    "output": Probe(value="{}/elsewhere.jsonl", seen=lambda t: t.given["path"][0][-15:], expected="elsewhere.jsonl"),
    "input_key": Probe(value="question", seen=scored(lambda s: s.prompt.text[:3]), expected=["ask"] * 8),
    "output_key": Probe(value="question", seen=scored(lambda s: s.response_text[:3]), expected=["ask"] * 8),
    "label_key": Probe(value="answer", seen=scored(lambda s: len(s.prompt.label)), expected=[3] * 8),
    "max_samples": Probe(value=3, seen=lines(len)),
    **MODELS,
    **{
        name: probe
        for name, probe in REWARD.items()
        if name.startswith(("reward_", "remote_"))
        and name not in ("reward_skip_special_tokens", "reward_weights", "remote_rm_url")
    },
    "remote_rm_url": Probe(
        value=("http://[::1]:7/b",),
        seen=lambda t: [(one["name"], one["urls"]) for one in t.given["remote"]],
        expected=[("remote", ["http://[::1]:7/b"])],
    ),
    "min_result_fraction": Probe(
        value=0.6, seen=lambda t: "50.0% of the samples have no result" in t.error, expected=True, also=LOST
    ),
    "max_no_result_fraction": Probe(
        value=0.4, seen=lambda t: "50.0% of the samples have no result" in t.error, expected=True, also=LOST
    ),
    "max_untrained_steps": Probe(value=2, seen=refused("max_untrained_steps is ignored"), expected=True),
    "reward_skip_special_tokens": Probe(
        value=False, seen=refused("reward_skip_special_tokens is ignored"), expected=True
    ),
}


def template_of(trace: Trace) -> set[str]:
    """How the first prompt begins."""
    return {row["input"][:4] for row in trace.given["lines"]}


SELECT: dict[str, Probe] = {
    "dataset": Probe(value="{}/other_scored.jsonl", seen=lines(len), expected=6),
    "output": Probe(value="{}/elsewhere.jsonl", seen=lambda t: t.given["path"][0][-15:], expected="elsewhere.jsonl"),
    "post_processor": Probe(value="iter_dpo", seen=lines(lambda rows: rows[0]["chosen_reward"]), expected=0.5),
    "normalize_reward": Probe(
        value=True, seen=lines(lambda rows: abs(sum(row["reward"] for row in rows)) < 1e-9), expected=True
    ),
    "reward_template": Probe(value="{reward}|{input}", seen=template_of, expected={f"{i / 2:.2f}" for i in range(8)}),
}
