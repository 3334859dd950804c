"""Every option of `megarlhf serve-rm`: what it is set to, and where the server shows it."""

from tests.config.option_probes import Probe, given, own_layout_probes, transformer, world

RULE = {"reward_function": None, "reward_rule": "exact_match"}
MODEL = {"reward_function": None, "reward_pretrain": "{}/rm", "max_len": 64}

SERVE: dict[str, Probe] = {
    **own_layout_probes("reward", "reward_pretrain", several=True, beside=False, **MODEL),
    "reward_pretrain": Probe(
        value="{}/rm_experts",
        seen=lambda t: t.engine("reward").pretrain.name,
        expected="rm_experts",
        also={"reward_function": None, "max_len": 64},
        before={"reward_pretrain": "{}/rm"},
    ),
    "reward_num_gpus_per_node": Probe(value=3, seen=world("world_size", "reward"), also=MODEL),
    "bf16": Probe(value=True, seen=transformer("bf16", "reward"), also=MODEL),
    # The value of a token is a tenth of its number, and EOS has 2: (0.2 - 0.5) / 2.
    "normalize_reward": Probe(
        value=True,
        seen=lambda t: [(round(reward, 5), why) for reward, why in t.given["outcomes"]],
        **{"expected": [(-0.15, None)], "also": MODEL},
    ),
    "start_timeout_seconds": Probe(value=71.0, seen=lambda t: round(t.waits[0]), **{"expected": 71, "also": MODEL}),
    "phase_timeout_seconds": Probe(
        value=1717.0, seen=lambda t: round(t.waits[-1]), **{"expected": 1717, "also": MODEL}
    ),
    "gpu_memory_gib": Probe(
        value=0.001, seen=lambda t: "gpu_memory_gib=0.001; " in t.error, **{"expected": True, "also": MODEL}
    ),
    "host": Probe(
        value="127.0.0.2",
        seen=lambda t: (t.given["listening"][0][0], "http://127.0.0.2:" in t.said),
        expected=("127.0.0.2", True),
    ),
    "port": Probe(
        value=21713,
        seen=lambda t: (t.given["listening"][0][1], ":21713/get_reward" in t.said),
        expected=(21713, True),
    ),
    "ssl_certfile": Probe(
        value="{}/key.pem",
        seen=lambda t: (str(t.given["tls"][0]["ssl_certfile"])[-7:], "ready at https://" in t.said),
        expected=("key.pem", True),
    ),
    "ssl_keyfile": Probe(
        value="{}/key.pem",
        seen=lambda t: str(t.given["tls"][0]["ssl_keyfile"])[-7:],
        expected="key.pem",
        also={"ssl_certfile": "{}/reward.py"},
    ),
    "stop_texts": Probe(value=("</s>", "<e>"), seen=given("server", "_stop_texts"), also=RULE),
    "max_len": Probe(value=77, seen=given("server", "max_len")),
    "max_batch_tokens": Probe(
        value=3456,
        seen=lambda t: (t.given["server"][0]["max_batch_tokens"], t.engine("reward").packing.max_tokens),
        **{"expected": (3456, 3456), "also": MODEL},
    ),
    "max_queries": Probe(value=79, seen=given("server", "max_queries")),
    "max_waiting_queries": Probe(value=8000, seen=given("server", "max_waiting_queries")),
    "max_body_mib": Probe(value=3, seen=given("server", "max_body_bytes"), expected=3 << 20),
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
        value="a+",
        seen=given("reward", "rule_pattern"),
        also={"reward_function": None, "reward_rule": "format"},
        before={"reward_format": "b+"},
    ),
    "reward_timeout_seconds": Probe(value=7.7, seen=given("reward", "timeout_seconds")),
    "reward_num_workers": Probe(value=3, seen=given("reward", "num_workers")),
    "reward_chunk_size": Probe(value=3, seen=given("reward", "chunk_size")),
    "reward_env": Probe(value=("KEY_OF_A_SERVICE",), seen=given("reward", "passed_variables")),
    "reward_memory_gib": Probe(value=1.5, seen=given("reward", "memory_bytes"), expected=3 << 29),
    "reward_network": Probe(value=True, seen=given("reward", "network")),
}
