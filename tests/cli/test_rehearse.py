"""A run of 1,024 GPUs without any: groups, devices, weights and where ranks meet, against formulae of their own."""

import json
import math
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli import run_rehearse
from megarlhf.cli.main import main
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.planner.placement import plan_placement
from tests.cli.conftest import LLAMA_3_70B
from tests.tiny_models import make_model


def rehearsed(directory: Path, content: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """The rehearsal of a model of which there is a config.json alone, as its file has it."""
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(json.dumps(content))
    places = {"pretrain": directory / "model", "prompt_data": directory / "none.jsonl", "save": directory / "run"}
    config = from_dict(PPOConfig, {name: str(place) for name, place in places.items()} | {"bf16": True} | options)
    assert run_rehearse.run(config, dry_run=False) == 0
    return [json.loads(line) for line in (directory / "run" / run_rehearse.FILE).read_text().splitlines()]


def tiles(parts: list[list[list[int]]], shape: tuple[int, ...]) -> bool:
    """Whether boxes that are cut along one axis alone fill a tensor without overlap."""
    cut = [axis for axis, size in enumerate(shape) if any(part[axis] != [0, size] for part in parts)]
    if not cut:
        return len(parts) == 1
    (axis,) = cut
    ends = sorted(part[axis] for part in parts)
    return [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])] and ends[-1][1] == shape[axis]


@pytest.mark.slow  # some 7 s of a quiet core
def test_llama_70b_on_128_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TP8 x PP4 x DP32 in Megatron's order, rank = tp + 8 * (dp + 32 * pp), in seconds: four stages are built twice."""
    started = time.process_time()
    sizes = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "sequence_parallel": True}
    nodes = {"actor_num_nodes": 128, "actor_num_gpus_per_node": 8}
    engines = {"vllm_num_engines": 128, "vllm_tensor_parallel_size": 8}
    processes = rehearsed(tmp_path, LLAMA_3_70B, **sizes, **nodes, **engines, update_weight_buffer_mib=96)
    assert time.process_time() - started < 60
    by_role: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for process in processes:
        by_role[process["role"]].append(process)
    assert {role: len(own) for role, own in by_role.items()} == {"actor": 1024, "critic": 1024, "rollout": 128}
    for process in (*by_role["actor"], *by_role["critic"]):
        rank, groups = process["rank"], process["groups"]
        tp, dp, pp = rank % 8, rank // 8 % 32, rank // 256
        assert (process["node"], process["devices"], process["meets_at_node"]) == (rank // 8, [tp], 0)
        assert groups["TENSOR_MODEL_PARALLEL_GROUP"] == list(range(rank - tp, rank - tp + 8))
        assert groups["PIPELINE_MODEL_PARALLEL_GROUP"] == [rank % 256 + 256 * stage for stage in range(4)]
        replicas = [tp + 8 * (d + 32 * pp) for d in range(32)]
        assert groups["DATA_PARALLEL_GROUP"] == groups["DATA_PARALLEL_GROUP_WITH_CP"] == replicas
        assert replicas[dp] == rank and ("EMBEDDING_GROUP" in groups) == (pp in (0, 3))
    assert [(p["node"], p["devices"]) for p in by_role["rollout"]] == [(n, list(range(8))) for n in range(128)]
    parts, sent = defaultdict(list), 0
    for process in by_role["actor"]:
        for piece in process["sends"]:
            parts[piece["tensor"]].append(piece["part"])
            assert piece["bytes"] == 2 * math.prod(end - start for start, end in piece["part"])
            sent += piece["bytes"]
    assert sent == 2 * 70_553_706_496 and len(parts) == 80 * 9 + 3
    layer = {"self_attn.q_proj": (8192, 8192), "self_attn.o_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192)}
    layer |= {"mlp.down_proj": (8192, 28672), "mlp.up_proj": (28672, 8192), "input_layernorm": (8192,)}
    for number in range(80):
        assert all(tiles(parts[f"model.layers.{number}.{name}.weight"], shape) for name, shape in layer.items())
    assert all(tiles(parts[name], (128256, 8192)) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    buckets = [(bucket, p["rank"]) for p in by_role["actor"] for bucket in p["buckets"]]
    assert sum(bucket["bytes"] for bucket, _ in buckets) == sent and max(b["bytes"] for b, _ in buckets) <= 96 * 2**20
    assert sorted(bucket["number"] for bucket, _ in buckets) == list(range(len(buckets)))
    assert {rank for _, rank in buckets} == {tp + 256 * stage for tp in range(8) for stage in range(4)}
    assert all(p["weights_meet_at_node"] == 0 for p in (*by_role["actor"], *by_role["rollout"]))
    said = capsys.readouterr().out
    assert "weights to the engines: ipc (" in said and f"  {len(buckets)} buckets of at most " in said
    assert "TENSOR_MODEL_PARALLEL_GROUP: 128 of 8, each inside a node" in said
    assert "PIPELINE_MODEL_PARALLEL_GROUP: 256 of 4, across nodes" in said


def test_experts_are_handed_out_by_their_own_replicas(tmp_path: Path) -> None:
    """EP2 of 4 ranks: each half of the experts lies on two ranks."""
    content = json.loads((make_model(tmp_path / "moe", family="mixtral") / "config.json").read_text())
    options = {"actor_num_gpus_per_node": 4, "expert_model_parallel_size": 2, "advantage_estimator": "rloo"}
    processes = rehearsed(tmp_path, content, **options, bf16=False)
    senders = defaultdict(set)
    for process in processes[:4]:
        for piece in process["sends"]:
            if ".experts." in piece["tensor"]:
                senders[int(piece["tensor"].split(".experts.")[1].split(".")[0])].add(process["rank"])
    half = len(senders) // 2
    assert all(ranks <= ({0, 2} if expert < half else {1, 3}) for expert, ranks in senders.items()) and half >= 2
    assert set().union(*senders.values()) == {0, 1, 2, 3}


def test_buckets_are_those_of_the_ranks_that_send(tmp_path: Path) -> None:
    """Two stages of two replicas, engines on GPUs of their own: the first replica sends, ranks 0 and 2."""
    content = json.loads((make_model(tmp_path / "tiny", family="llama") / "config.json").read_text())
    options = {"pipeline_model_parallel_size": 2, "actor_num_gpus_per_node": 4, "colocate_all_models": False}
    processes = rehearsed(tmp_path, content, **options, advantage_estimator="rloo", bf16=False)
    meeting = [process["rank"] for process in processes if process["role"] == "actor" and process["buckets"]]
    assert meeting == [0, 2] == [p["rank"] for p in processes if p["role"] == "actor" and "weights_meet_at_node" in p]
    numbers = [bucket["number"] for process in processes[:4] for bucket in process["buckets"]]
    assert sorted(numbers) == list(range(len(numbers))) and len(numbers) >= 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model", family="llama")
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "1 + 1", "label": "2"}\n')
    flags = ["--pretrain", model, "--prompt_data", data, "--save", tmp_path / "run", "--reward_rule", "math"]
    flags += ["--actor_num_gpus_per_node", 4, "--tensor-model-parallel-size", 2, "--no_colocate_all_models"]
    flags += ["--prompt_max_len", 16, "--generate_max_len", 16]
    assert main(["rehearse", *map(str, flags), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "weights to the engines: broadcast (" in said and "buckets of at most " in said and "from 2 ranks\n" in said
    assert "critic: 4 processes on 1 node(s)\n  meet at node 1\n" in said and "\n9 processes rehearsed in " in said
    assert not (tmp_path / "run").exists()


def test_a_device_that_two_ranks_have_is_told() -> None:
    config = from_dict(PPOConfig, {"pretrain": "a", "prompt_data": "b", "save": "c", "actor_num_gpus_per_node": 2})
    plan = plan_placement(config, run_rehearse.asked_machine(config))
    run_rehearse.check_devices(plan, colocated=True)
    with pytest.raises(RuntimeError, match="actor 0 and critic 0 have device 0 of node 0"):
        run_rehearse.check_devices(plan, colocated=False)
    twice = replace(plan, workers=(*plan.workers, plan.workers[0]), notes=())
    run_rehearse.check_devices(twice, colocated=True)  # the same rank
