"""Every option of `megarlhf ppo` but those of layout and optimizer: what it is set to, and where a run shows it."""

from typing import Any

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
    given,
    kernel_probes,
    layout_probes,
    linked,
    megatron_probe,
    metric,
    optimizer_probes,
    own_layout_probes,
    refused,
    steps_with,
    transformer,
    world,
)
from tests.config.option_probes_precision import ROLLOUT as ROLLOUT_DTYPE
from tests.config.option_probes_precision import precision_probes
from tests.config.option_probes_tricks import TRICKS

RLOO = {"advantage_estimator": "rloo"}
SERVER = "http://127.0.0.1:5000/get_reward"
REMOTE = {"remote_rm_url": (SERVER,)}
JUDGED = {"reward_pretrain": "{}/rm"}


def llm(name: str) -> Seen:
    """An argument of vLLM's LLM."""
    return lambda trace: trace.llms[0].options[name]


def sampling(name: str) -> Seen:
    """A field of vLLM's SamplingParams in the first step; the greedy evaluation comes before."""
    return lambda trace: getattr(trace.llms[0].parameters[1][0], name)


def policy(name: str) -> Seen:
    """A coefficient of the actor's loss."""
    return lambda trace: getattr(trace.given["policy_objective"][0]["positional"][0], name)


def calls(role: str, method: str) -> Seen:
    """How often a worker's method was called, over all ranks."""
    return lambda trace: sum((r, m) == (role, method) for r, _, m in trace.calls)


def texts(trace: Trace) -> set[str]:
    """Prompts that were answered and scored."""
    return {sample.prompt.text for samples in trace.given["scored"] for sample in samples}


def labels(trace: Trace) -> set[Any]:
    """Their labels."""
    return {sample.prompt.label for samples in trace.given["scored"] for sample in samples}


def size_of_scored(number: int) -> Seen:
    """Samples in a call of the reward; the evaluation's before the first step is number 0."""
    return lambda trace: len(trace.given["scored"][number])


MODEL = {
    "pretrain": Probe(
        value="{}/other",
        seen=both(
            lambda t: [t.engine(role).pretrain.name for role in ("actor", "critic")],
            lambda t: t.llms[0].options["model"].rsplit("/", 1)[1],
            lambda t: {path.rsplit("/", 1)[1] for path in t.given["engine's tokenizer"]},
        ),
        expected=(["other", "other"], "other", {"other"}),
    ),
    "critic_pretrain": Probe(
        value="{}/other",
        seen=lambda t: [t.engine(role).pretrain.name for role in ("actor", "critic")],
        expected=["model", "other"],
    ),
    "reward_pretrain": Probe(
        value="{}/rm,{}/rm",
        seen=both(
            lambda t: [t.engine(role).pretrain.name for role in ("actor", "critic", "reward_0", "reward_1")],
            lambda t: round(metric("reward/reward_model_1/mean", 1)(t), 5),
        ),
        expected=(["model", "rm", "rm", "rm"], 0.2),
    ),
    "tokenizer": Probe(
        value="{}/tokenizer",
        seen=lambda t: [
            path.rsplit("/", 1)[1]
            for path in (t.given["engine's tokenizer"][0], str(t.given["export"][0]["tokenizer"]))
        ],
        expected=["tokenizer", "tokenizer"],
        before={"tokenizer": "{}/other"},
    ),
    "bf16": Probe(
        value=True,
        seen=both(transformer("bf16"), transformer("bf16", "critic"), adam("bf16"), llm("dtype"), policy("tis_cap")),
        expected=(True, True, True, "bfloat16", 2.0),
    ),
    "moe_aux_loss_coeff": Probe(
        value=0.077,
        seen=both(transformer("moe_aux_loss_coeff"), transformer("moe_router_load_balancing_type")),
        expected=(0.077, "aux_loss"),
        also={"pretrain": "{}/experts"},
    ),
    "seed": Probe(
        value=1234,
        seen=both(world("seed"), world("seed", "critic"), transformer("drawn_from", "critic"), llm("seed")),
        expected=(1234, 1234, 1234, 1234),
    ),
}

CLUSTER = {
    "actor_num_nodes": Probe(
        **{"value": 3, "seen": both(world("world_size"), world("world_size", "critic")), "expected": (3, 2)},
        also={"critic_num_nodes": 2, "ray_address": "10.0.0.1:6379"},
    ),
    "critic_num_nodes": Probe(
        **{"value": 3, "seen": world("world_size", "critic"), "expected": 3},
        also={"ray_address": "10.0.0.1:6379"},
    ),
    "network_interface": Probe(
        **{"value": "eth7", "seen": both(given("interface", "name"), given("interface", "at"))},
        expected=("eth7", "10.0.0.0"),
        also={"critic_num_nodes": 2, "ray_address": "10.0.0.1:6379"},
    ),
    "actor_num_gpus_per_node": Probe(
        value=4,
        seen=both(world("world_size"), calls("actor", "start"), calls("critic", "start")),
        expected=(4, 4, 3),
        also={"critic_num_gpus_per_node": 3},
    ),
    "critic_num_gpus_per_node": Probe(
        value=3,
        seen=both(world("world_size", "critic"), calls("actor", "start"), calls("critic", "start")),
        expected=(3, 1, 3),
    ),
    "reward_num_nodes": Probe(
        **{"value": 2, "seen": world("world_size", "reward"), "expected": 2},
        also=JUDGED | {"ray_address": "10.0.0.1:6379"},
    ),
    "reward_num_gpus_per_node": Probe(
        value=3,
        seen=both(world("world_size", "reward"), calls("actor", "start"), calls("reward", "start")),
        **{"expected": (3, 1, 3), "also": JUDGED},
    ),
    "colocate_all_models": Probe(
        value=False,
        seen=both(calls("actor", "sleep"), calls("critic", "wake"), calls("rollout", "sleep")),
        expected=(0, 0, 0),
    ),
    "vllm_num_engines": Probe(value=3, seen=both(lambda t: len(t.llms), calls("rollout", "start")), expected=(3, 3)),
    "vllm_tensor_parallel_size": Probe(value=2, seen=llm("tensor_parallel_size")),
    "ref_reward_offload": Probe(
        value=False,
        seen=both(lambda t: t.engine("actor").memory.is_awake("reference"), calls("reward", "sleep")),
        **{"expected": (True, 1), "also": JUDGED},
    ),
    "host_memory_gib": Probe(value=0.001, seen=lambda t: "host_memory_gib=0.001; " in t.error, expected=True),
    "weight_transport": Probe(value="broadcast", seen=calls("actor", "send_weights"), expected=3),
    "update_weight_buffer_mib": Probe(
        value=1, seen=lambda t: t.given["buckets"], expected=[2], also={"weight_transport": "broadcast"}
    ),
    "gpu_memory_gib": Probe(value=0.001, seen=lambda t: "gpu_memory_gib=0.001; " in t.error, expected=True),
    "ray": Probe(
        value=False, seen=both(lambda t: len(t.given["ray.init"]), lambda t: len(t.given["children"])), expected=(0, 1)
    ),
    "ray_address": Probe(value="ray://10.1.2.3:4", seen=given("ray.init", "address")),
    "start_timeout_seconds": Probe(value=71.0, seen=lambda t: round(t.waits[1]), expected=71),
    "max_restarts": Probe(value=2, seen=given("with_restarts", "max_restarts")),
    "phase_timeout_seconds": Probe(value=1717.0, seen=lambda t: {round(wait) for wait in t.waits[7:]}, expected={1717}),
}

BATCH = {
    "train_iters": Probe(value=3, seen=lambda t: [row["step"] for row in t.given["metrics"]], expected=[0, 1, 2, 3]),
    "rollout_batch_size": Probe(
        value=6, seen=both(lambda t: len(t.llms[0].parameters[1]), size_of_scored(1)), expected=(12, 12)
    ),
    "n_samples_per_prompt": Probe(
        value=3,
        seen=both(size_of_scored(1), lambda t: max(s.sample_id for s in t.given["scored"][1])),
        expected=(12, 2),
    ),
    "global_batch_size": Probe(
        value=8, seen=both(calls("actor", "update"), calls("critic", "update")), expected=(2, 2)
    ),
    "micro_batch_size": Probe(
        value=1,
        seen=both(lambda t: t.engine().packing.max_tokens, lambda t: t.engine("critic").packing.max_tokens),
        expected=(24, 24),
    ),
    "max_tokens_per_micro_batch": Probe(
        value=30,
        seen=both(
            lambda t: t.engine().packing.max_tokens,
            lambda t: t.engine("critic").packing.max_tokens,
            lambda t: min(batches for _, batches in t.given["forward actor"]) > 1,
        ),
        expected=(30, 30, True),
    ),
    "logprob_chunk_tokens": Probe(value=77, seen=lambda t: t.engine()._outputs.keywords["distribution"].chunk_tokens),
    "max_epochs": Probe(value=2, seen=both(calls("actor", "update"), calls("critic", "update")), expected=(8, 8)),
    "share_prompt_prefix": Probe(
        value=False,
        seen=both(
            lambda t: t.engine().packing.share_prefix,
            lambda t: t.engine("critic").packing.share_prefix,
        ),
        expected=(False, False),
    ),
}

OPTIMIZER = optimizer_probes("actor") | {
    "actor_learning_rate": Probe(value=7.1e-4, seen=both(adam("lr"), adam("lr", "critic")), expected=(7.1e-4, 9e-6)),
    "critic_learning_rate": Probe(value=7.2e-4, seen=both(adam("lr"), adam("lr", "critic")), expected=(1e-6, 7.2e-4)),
    "freezing_actor_steps": Probe(
        value=1,
        seen=both(calls("actor", "update"), calls("critic", "update"), steps_with("policy/loss")),
        expected=(2, 4, [2]),
    ),
}


def advantages(name: str) -> Seen:
    """An argument of the advantages of the first step."""
    return given("compute_advantages", name)


ALGORITHM = {
    "advantage_estimator": Probe(
        value="group_norm",
        seen=both(lambda t: t.given["compute_advantages"][0]["positional"], calls("critic", "start")),
        expected=(("group_norm",), 0),
    ),
    "gamma": Probe(value=0.61, seen=advantages("gamma")),
    "lambd": Probe(value=0.62, seen=advantages("lambd")),
    "init_kl_coef": Probe(value=0.063, seen=both(advantages("kl_coef"), metric("kl/coef", 1)), expected=(0.063, 0.063)),
    "kl_target": Probe(
        value=0.5,
        seen=lambda t: round(metric("kl/coef", 2)(t) / metric("kl/coef", 1)(t), 6),
        **{"expected": 1 - 0.2 * 8 / 10000, "before": {"kl_target": None}},
    ),
    "kl_horizon": Probe(
        value=16,
        seen=lambda t: round(metric("kl/coef", 2)(t) / metric("kl/coef", 1)(t), 6),
        **{"expected": 1 - 0.2 * 8 / 16, "also": {"kl_target": 0.5}},
    ),
    "kl_estimator": Probe(
        value="k2",  # step 2 starts two optimizer steps of 0.004 from the reference
        seen=both(policy("kl_estimator"), lambda t: round(metric("kl/mean", 2)(t), 8)),
        expected=("k2", 0.5 * 0.008**2),
    ),
    "use_kl_loss": Probe(
        value=True,
        seen=both(policy("kl_loss_coef"), advantages("kl_coef"), advantages("kl")),
        **{"expected": (0.05, 0.0, None), "also": {"kl_estimator": "k3", "init_kl_coef": 0.05}},
    ),
    "eps_clip": Probe(value=0.31, seen=both(policy("clip_eps_low"), policy("clip_eps_high")), expected=(0.31, 0.31)),
    "eps_clip_high": Probe(
        value=0.32, seen=both(policy("clip_eps_low"), policy("clip_eps_high")), expected=(0.2, 0.32)
    ),
    "dual_clip": Probe(value=3.3, seen=policy("dual_clip")),
    "use_tis": Probe(
        value=True,
        seen=both(policy("tis_cap"), lambda t: metric("policy/tis_mean", 1)(t) is not None),
        expected=(2.0, True),
    ),
    "tis_cap": Probe(
        value=1.5, seen=both(policy("tis_cap"), policy("tis_mask_range")), expected=(1.5, None), also={"use_tis": True}
    ),
    "tis_mask_range": Probe(value=(0.25, 4.0), seen=policy("tis_mask_range"), also={"use_tis": True}),
    "value_clip": Probe(value=0.34, seen=given("value_objective", "value_clip")),
    "entropy_coef": Probe(value=0.035, seen=policy("entropy_coef")),
    "reward_clip_range": Probe(value=(-0.5, 0.75), seen=advantages("clip_range")),
    "normalize_reward": Probe(
        value=True,
        seen=lambda t: round(float(t.given["compute_advantages"][0]["rewards"].mean()), 5),
        expected=0.0,
    ),
    "normalize_advantages": Probe(
        value=False,
        seen=both(advantages("normalize"), lambda t: round(metric("advantage/std", 1)(t), 4) == 1.0),
        expected=(False, False),
    ),
    "loss_aggregation": Probe(
        value="sequence",
        seen=lambda t: sum_of_denominators(t, "actor"),
        **{"expected": {4.0}, "also": RLOO},
    ),
    "critic_loss_aggregation": Probe(value="sequence", seen=lambda t: sum_of_denominators(t, "critic"), expected={4.0}),
}


def sum_of_denominators(trace: Trace, role: str) -> set[float]:
    """What the losses of a role's optimizer steps are divided by; 4 samples are in each."""
    return set(trace.given[f"denominator {role}"])


def kept(name: str) -> Seen:
    """What the trainer takes log-probs over."""
    return lambda trace: getattr(trace.engine()._outputs.keywords["distribution"].truncation, name)


ROLLOUT: dict[str, Probe] = {
    "prompt_max_len": Probe(
        value=18, seen=both(llm("max_model_len"), lambda t: t.engine().packing.max_tokens), expected=(26, 104)
    ),
    "generate_max_len": Probe(
        value=5,
        seen=both(sampling("max_tokens"), llm("max_model_len"), lambda t: t.engine().packing.max_tokens),
        expected=(5, 21, 84),
    ),
    "temperature": Probe(
        value=0.7,
        seen=both(
            sampling("temperature"),
            lambda t: t.engine()._outputs.keywords["distribution"].temperature,
            lambda t: t.engine("critic")._outputs.keywords["distribution"].temperature,
        ),
        expected=(0.7, 0.7, 0.7),
    ),
    "top_p": Probe(value=0.9, seen=both(sampling("top_p"), kept("top_p")), expected=(0.9, 0.9), also={"top_k": 5}),
    "top_k": Probe(value=5, seen=both(sampling("top_k"), kept("top_k")), expected=(5, 5)),
    "min_p": Probe(value=0.1, seen=both(sampling("min_p"), kept("min_p")), expected=(0.1, 0.1), also={"top_k": 5}),
    "repetition_penalty": Probe(value=1.3, seen=refused("repetition_penalty=1.3 is not offered"), expected=True),
    "max_num_seqs": Probe(value=13, seen=llm("max_num_seqs")),
    "vllm_gpu_memory_utilization": Probe(value=0.66, seen=llm("gpu_memory_utilization")),
    "vllm_kv_cache_gib": Probe(value=0.25, seen=llm("kv_cache_memory_bytes"), expected=2**28),
    "enforce_eager": Probe(value=False, seen=llm("enforce_eager")),
    "logprob_kl_budget": Probe(
        value=1.5e-5, seen=lambda t: any("logprob_kl_budget=1.5e-05" in said for said in t.warnings), expected=True
    ),
    "logprob_diff_budget": Probe(
        value=0.0055, seen=lambda t: any("logprob_diff_budget=0.0055" in said for said in t.warnings), expected=True
    ),
}

PASSED = {
    **megatron_probe("critic"),
    "vllm": Probe(
        value=(("max_num_batched_tokens", 4096), ("block_size", 16)),
        seen=lambda t: [t.llms[0].options.get(name) for name in ("max_num_batched_tokens", "block_size")],
        expected=[4096, 16],
    ),
}

DATA = {
    "prompt_data_probs": Probe(
        value="0.1,0.9",
        seen=lambda t: len(texts(t)) < 8,
        **{"expected": True, "also": {"prompt_data": "{}/rows.jsonl,{}/other_rows.jsonl", "eval_data": None}},
    ),
    "prompt_split": Probe(
        value="other",
        seen=lambda t: {x[:2] for x in texts(t)},
        **{"expected": {"ot"}, "also": {"prompt_data": "{}/splits", "eval_data": None}},
    ),
    "prompt_data": Probe(value="{}/other_rows.jsonl", seen=lambda t: {x[0] for x in texts(t)}, expected={"o", "e"}),
    "input_key": Probe(value="question", seen=lambda t: {x[:3] for x in texts(t)}, expected={"ask"}),
    "label_key": Probe(value="answer", seen=lambda t: {len(x) for x in labels(t)}, expected={3}),
    "apply_chat_template": Probe(
        value=True,
        seen=lambda t: {(x[:2], x[-3:]) for x in texts(t)},
        **{"expected": {("q ", " a ")}, "also": {"tokenizer": "{}/chat"}},
    ),
    "input_template": Probe(
        value="say {} now", seen=lambda t: {(x[:4], x[-4:]) for x in texts(t)}, expected={("say ", " now")}
    ),
    "tokenizer_chat_template": Probe(
        value=TEMPLATE.replace("q ", "z "),
        seen=both(lambda t: {x[:2] for x in texts(t)}, given("export", "chat_template")),
        **{"expected": ({"z "}, TEMPLATE.replace("q ", "z ")), "also": {"apply_chat_template": True}},
        before={"tokenizer_chat_template": TEMPLATE},
    ),
    "max_samples": Probe(value=3, seen=lambda t: len({s.prompt.index for s in t.given["scored"][1]}), expected=3),
}

EVALUATION: dict[str, Probe] = {
    "eval_data": Probe(
        value="{}/other_eval.jsonl,mine={}/eval.jsonl",
        seen=both(  # in parts of the 4 prompts that a step has
            size_of_scored(0),
            size_of_scored(1),
            lambda t: {k for k in t.given["metrics"][0] if k.endswith("/accuracy")},
        ),
        expected=(4, 1, {"eval/accuracy", "eval/other_eval/accuracy", "eval/mine/accuracy"}),
    ),
    "eval_split": Probe(
        value="other",
        seen=lambda t: {sample.prompt.text for sample in t.given["scored"][0]},
        **{"expected": {"ot split"}, "also": {"eval_data": "{}/splits"}},
    ),
    "eval_n_samples_per_prompt": Probe(
        value=3,
        seen=both(lambda t: len(t.llms[0].parameters[1]), lambda t: metric("eval/pass@3", 0)(t) is not None),
        expected=(6, True),
    ),
    "eval_temperature": Probe(value=0.35, seen=sampling("temperature"), also={"eval_n_samples_per_prompt": 2}),
}

REWARD: dict[str, Probe] = {
    "reward_weights": Probe(
        value=(10.0, 0.5),
        seen=lambda t: round(metric("reward/mean", 1)(t) - 0.5 * metric("reward/function/mean", 1)(t), 5),
        **{"expected": 2.0, "also": JUDGED},
    ),
    "reward_function": Probe(
        value="{}/reward2.py",
        seen=lambda t: str(t.given["reward"][0]["function_path"]).rsplit("/", 1)[1],
        expected="reward2.py",
    ),
    "reward_rule": Probe(
        value="math",
        seen=given("reward", "rule"),
        also={"reward_function": None},
        before={"reward_rule": "exact_match"},
    ),
    "reward_format": Probe(
        value="0.75",
        seen=given("reward", "rule_pattern"),
        also={"reward_function": None, "reward_rule": "format"},
        before={"reward_format": "0.875"},
    ),
    "remote_rm_url": Probe(
        value=(f"{SERVER},http://[::1]:7/b", "https://rewards.example/c"),
        seen=both(
            lambda t: [(one["name"], one["urls"], one["token"]) for one in t.given["remote"]],
            metric("reward/remote_1/no_result_count", 1),
            lambda t: {s.response_text.endswith("</s>") for s in t.given["scored"][1] if s.finish_reason == "stop"},
        ),
        expected=(
            [
                ("remote_0", [SERVER, "http://[::1]:7/b"], "secret too"),
                ("remote_1", ["https://rewards.example/c"], "secret too"),
            ],
            0.0,
            {True},
        ),
    ),
    "remote_rm_batch_size": Probe(value=7, seen=given("remote", "batch_size"), also=REMOTE),
    "remote_rm_concurrency": Probe(value=3, seen=given("remote", "concurrency"), also=REMOTE),
    "remote_rm_timeout_seconds": Probe(value=33.5, seen=given("remote", "timeout_seconds"), also=REMOTE),
    "remote_rm_max_retries": Probe(value=0, seen=given("remote", "max_retries"), also=REMOTE),
    "remote_rm_allow_http": Probe(
        value=True,
        seen=given("remote", "urls"),
        expected=["http://10.1.2.3:5000/get_reward"],
        also={"remote_rm_url": ("http://10.1.2.3:5000/get_reward",)},
    ),
    "max_no_result_fraction": Probe(
        value=0.4,
        seen=lambda t: "for 4 of 8 samples (function for 4); max_no_result_fraction=0.4 allows 3" in t.error,
        expected=True,
        also={"reward_function": None, "reward_rule": "format", "reward_format": "0.5"},
    ),
    "min_result_fraction": Probe(
        value=0.8,
        seen=metric("reward/untrained_steps", 2),
        expected=2.0,
        also={"reward_function": None, "reward_rule": "format", "reward_format": "0.75"},
    ),
    "max_untrained_steps": Probe(
        value=2,
        seen=lambda t: "max_untrained_steps=2" in t.error,
        expected=True,
        also={"reward_function": None, "reward_rule": "format", "reward_format": "0.25"},
    ),
    "reward_timeout_seconds": Probe(value=7.7, seen=given("reward", "timeout_seconds")),
    "reward_num_workers": Probe(value=3, seen=given("reward", "num_workers")),
    "reward_chunk_size": Probe(value=3, seen=given("reward", "chunk_size")),
    "reward_env": Probe(value=("KEY_OF_A_SERVICE",), seen=given("reward", "passed_variables")),
    "reward_memory_gib": Probe(value=1.5, seen=given("reward", "memory_bytes"), expected=3 << 29),
    "reward_network": Probe(value=True, seen=given("reward", "network")),
    "reward_skip_special_tokens": Probe(
        value=False,
        seen=lambda t: {s.response_text.endswith("</s>") for s in t.given["scored"][1] if s.finish_reason == "stop"},
        expected={True},
    ),
}

LOGGING: dict[str, Probe] = {
    "save": Probe(
        value="{}/elsewhere",
        seen=lambda t: t.given["export"][0]["directory"].parent.name,
        expected="elsewhere",
    ),
    "load": Probe(
        value="{}/first_ppo",
        seen=both(lambda t: [path.name for path, _ in t.given["load"]], lambda t: t.given["metrics"][0]["step"]),
        **{"expected": (["actor", "critic"], 3), "also": {"train_iters": 3}},
    ),
    "load_checkpoint": Probe(
        value=True,
        seen=lambda t: [path.name for path, _ in t.given["load"]],
        **{"expected": ["actor", "critic"], "also": {"save": "{}/again_ppo"}},
    ),
    "ckpt_path": Probe(value="{}/checkpoints_ppo", seen=linked, expected=(True, ["iter_0000002"])),
    "max_ckpt_mem": Probe(
        value=1e-9,
        seen=lambda t: t.given["checkpoints"],
        **{"expected": ["iter_0000002"], "also": {"save_interval": 1}},
    ),
    "no_load_optim": Probe(
        value=True,
        seen=lambda t: {with_optimizer for _, with_optimizer in t.given["load"]},
        **{"expected": {False}, "also": {"train_iters": 3, "load": "{}/first_ppo"}},
    ),
    "save_interval": Probe(value=1, seen=lambda t: t.given["checkpoints"], expected=["iter_0000001", "iter_0000002"]),
    "eval_interval": Probe(value=1, seen=steps_with("eval/accuracy"), expected=[0, 1, 2]),
    **best_probes("eval/response_length_mean"),
    "log_interval": Probe(
        value=3,
        seen=lambda t: [f"step {n}/3" in t.said for n in (1, 2, 3)],
        expected=[False, False, True],
        also={"train_iters": 3},
    ),
    "max_ckpt_num": Probe(
        value=1,
        seen=lambda t: t.given["checkpoints"],
        **{"expected": ["iter_0000002"], "also": {"save_interval": 1}},
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


def ppo_ranks(number: int) -> Options:
    """Ranks of the actor, and of the critic with it."""
    return {"actor_num_gpus_per_node": number}


PPO = {
    **own_layout_probes("reward", "reward_pretrain", several=True, **JUDGED),
    **(MODEL | layout_probes("actor", ppo_ranks) | own_layout_probes("critic", "pretrain") | kernel_probes("critic")),
    **(PASSED | CLUSTER | BATCH | OPTIMIZER | ALGORITHM | ROLLOUT | DATA | EVALUATION | REWARD | LOGGING | LORA),
    **(TRICKS | precision_probes("actor") | ROLLOUT_DTYPE),
}
