"""The launchers' flags are flags of the program, and their plans are possible."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megarlhf.cli.memory import plan_memory
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.checks import check_ppo
from megarlhf.config.command_line import parse
from megarlhf.config.roles import megatron_roles
from megarlhf.engine.indexed_data import CorpusWriter
from megarlhf.formats.huggingface import read_config
from megarlhf.planner.placement import Machine, plan_placement
from megarlhf.planner.transport import Way, plan_transport
from tests.cli.conftest import CODE_LLAMA_34B, LLAMA_2_7B, LLAMA_3_8B, LLAMA_3_70B, QWEN3_30B_A3B, large_model
from tests.tiny_models import make_reward_model

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
ROOT = Path(__file__).parents[2]


def dry_run(script: str, tmp_path: Path, *flags: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / script), "--dry-run", *flags],
        env=os.environ | {"SAVE": str(tmp_path / "run with space")} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_documented(script: str, printed: str, *flags: str) -> None:
    """The table of bytes is the one in docs/memory.md; with MEGARLHF_WRITE_DOCS=1 it is put there."""
    table = printed[re.search(r"^(GiB|MiB) on device ", printed, re.MULTILINE).start() :].strip()  # type: ignore[union-attr]
    page = ROOT / "docs" / "memory.md"
    shown = " ".join((f"examples/{script}", "--dry-run", *flags))
    block = re.compile(rf"(?<=^`{re.escape(shown)}`\n\n```\n).*?(?=\n```$)", re.DOTALL | re.MULTILINE)
    if os.environ.get("MEGARLHF_WRITE_DOCS"):
        page.write_text(block.sub(lambda _: table, page.read_text()))
    assert block.findall(page.read_text()) == [table], f"{page}: MEGARLHF_WRITE_DOCS=1 renews it"


def test_llama_3_8b_on_eight_gpus(llama_3_8b: Path, tmp_path: Path) -> None:
    data = tmp_path / "math.jsonl"
    data.write_text('{"input": "1 + 1", "label": "2"}\n')
    script, flags = "ppo_llama3_8b_h100.sh", ("--gpu_memory_gib", "79")
    printed = dry_run(script, tmp_path, *flags, MODEL=str(llama_3_8b), PROMPT_DATA=str(data))
    check_documented(script, printed, *flags)
    lines = [line.split() for line in printed.splitlines()]
    for role in ("actor+reference", "critic", "rollout"):
        assert sum(line[:1] == [role] and line[1].isdecimal() for line in lines if len(line) > 1) == 8, role
    assert "tensor_model_parallel_size: 4" in printed and "bf16: true" in printed


CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b"}]
ROWS: dict[str, Any] = {  # one or several of each kind
    "sft": {"messages": CHAT},
    "csft": {"input": "a <rm_score>: 5.00 ", "output": "b"},
    "preferences": {"prompt": "a b", "chosen": "b", "rejected": "a"},
    "kto": [{"input": "a b", "output": "b", "label": 1}, {"input": "b", "output": "a", "label": 0}],
    "prm": {"input": "a = b =", "label": ["1", "0"]},
    "kd": {"input": "a b", "output": "b"},
}
GPU_LAUNCHERS = {  # script -> the model, bytes of a GPU in GiB, rows of data
    "sft_llama3_8b_h100.sh": (LLAMA_3_8B, 79, "sft"),
    "csft_llama3_8b_h100.sh": (LLAMA_3_8B, 79, "csft"),
    "rm_llama3_8b_h100.sh": (LLAMA_3_8B, 79, "preferences"),
    "prm_llama3_8b_h100.sh": (LLAMA_3_8B, 79, "prm"),
    "dpo_llama3_8b_h100.sh": (LLAMA_3_8B, 79, "preferences"),
    "kto_llama3_8b_h100.sh": (LLAMA_3_8B, 79, "kto"),
    "kd_llama3_8b_h100.sh": (LLAMA_3_8B, 79, "kd"),
    "sft_lora_llama3_8b_h100.sh": (LLAMA_3_8B, 79, "sft"),
    "dpo_llama_34b_a100.sh": (CODE_LLAMA_34B, 79, "preferences"),
    "sft_llama3_70b_h100.sh": (LLAMA_3_70B, 79, "sft"),
    "sft_lora_llama3_70b_h100.sh": (LLAMA_3_70B, 79, "sft"),
}


# script -> the model, GPUs of a node and their GiB, nodes and GiB of their hosts, how weights reach the engines: those
# have the actor's GPUs everywhere, and read its ranks' buckets there
RL_LAUNCHERS: dict[str, tuple[dict[str, Any], int, int, int, int, Way]] = {
    "ppo_llama3_8b_h100.sh": (LLAMA_3_8B, 8, 79, 1, 1000, "ipc"),  # 8 engines of 1
    "ppo_llama_34b_h100.sh": (CODE_LLAMA_34B, 8, 79, 4, 1500, "ipc"),  # 16 engines of 2
    "ppo_llama3_70b_h100.sh": (LLAMA_3_70B, 8, 79, 8, 1000, "ipc"),  # 8 engines of 8
    "grpo_qwen3_30b_a3b_h100.sh": (QWEN3_30B_A3B, 8, 79, 2, 1500, "ipc"),  # 8 engines of 2
    "ppo_llama3_70b_a100.sh": (LLAMA_3_70B, 8, 79, 2, 1900, "ipc"),  # 2 engines of 8
    "ppo_llama2_7b_24gb.sh": (LLAMA_2_7B, 4, 22, 1, 360, "ipc"),  # 2 engines of 2
}


@pytest.mark.parametrize("script", RL_LAUNCHERS)
def test_launchers_of_rl_fit_their_nodes(script: str, tmp_path: Path) -> None:
    """In this process, from a config.json alone, with what a shell makes of the flags: placement, transport, bytes."""
    content, gpus, gib, nodes, host_gib, way = RL_LAUNCHERS[script]
    model = tmp_path / "a model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": False}))
    (data := tmp_path / "math.jsonl").write_text('{"input": "1 + 1", "label": "2"}\n')
    (printer := tmp_path / "printer").write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    printer.chmod(0o755)
    places = {"MODEL": str(model), "PROMPT_DATA": str(data), "SAVE": str(tmp_path / "run"), "PYTHON": str(printer)}
    sizes = ("--gpu_memory_gib", str(gib), "--host_memory_gib", str(host_gib))
    command = ["bash", str(ROOT / "examples" / script), *sizes]
    flags = subprocess.check_output(command, env=os.environ | places, text=True).split("\0")[:-1]
    assert flags[:2] == ["-m", "megarlhf.cli.train_ppo_ray"]
    config, _ = parse(PPOConfig, flags[2:], "ppo")
    assert check_ppo(config) == []
    assert config.model.bf16 and config.cluster.actor_num_nodes == nodes
    plan = plan_placement(config, Machine.alike(kind="gpu", nodes=nodes, gpus_per_node=gpus, cores_per_node=96))
    assert {worker.node for worker in plan.of("rollout")} == {worker.node for worker in plan.of("actor")}
    assert plan.notes == (), "all GPUs are in use"
    transport = plan_transport(config, plan)
    assert (transport.name, transport.one_host) == (way, nodes == 1)
    models = [read_config(model)] * len(megatron_roles(config))
    memory = plan_memory(config, models)
    assert memory.misfits == [], memory.text()
    if config.optimizer.optimizer_cpu_offload:
        check_documented(script, memory.text(), *sizes)
        on_device = replace(config, optimizer=replace(config.optimizer, optimizer_cpu_offload=False))
        small_host = replace(config, cluster=replace(config.cluster, host_memory_gib=0.9 * host_gib))
        assert all(plan_memory(other, models).misfits for other in (on_device, small_host)), "it needs both"


@pytest.mark.slow
@pytest.mark.parametrize("script", GPU_LAUNCHERS)
def test_supervised_launchers_fit_their_gpus(script: str, assets: Path, tmp_path: Path) -> None:
    content, memory, kind = GPU_LAUNCHERS[script]
    model = large_model(assets, tmp_path / "a model", content)
    data = tmp_path / "rows.jsonl"
    rows = ROWS[kind] if isinstance(ROWS[kind], list) else [ROWS[kind]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"MODEL": str(model), "DATASET": str(data), "TEACHER_MODEL": str(model), "PLACEHOLDER_TOKEN": "="}
    given["REWARD_TOKENS"] = "1 0"
    printed = dry_run(script, tmp_path, "--gpu_memory_gib", str(memory), **given)
    assert "bf16: true" in printed and "left" in printed
    if script == "dpo_llama_34b_a100.sh":
        check_documented(script, printed, "--gpu_memory_gib", str(memory))


@pytest.mark.slow
def test_pretraining_llama_3_8b_on_eight_gpus(llama_3_8b: Path, tmp_path: Path) -> None:
    writer = CorpusWriter(str(tmp_path / "a"), vocab_size=128256)
    writer.add_documents(np.zeros(400_000, dtype=np.int32), np.full(40, 10_000))
    writer.close()
    given = {"MODEL": str(llama_3_8b), "DATA_PATH": f"2 {tmp_path / 'a'} 1 {tmp_path / 'a'}"}
    printed = dry_run("pretrain_llama3_8b_h100.sh", tmp_path, "--gpu_memory_gib", "79", **given)
    assert "sequences of 8192; 61 of the 92 units" in printed and "bf16: true" in printed and "left" in printed


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the launchers put SmolLM2 and the data; made by the first."""
    directory = tmp_path_factory.mktemp("smollm2")
    return {"MODEL": str(directory / "a model"), "DATA": str(directory / "some data")}


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("ppo_smollm2_cpu.sh", marks=pytest.mark.slow),
        pytest.param("ppo_lora_smollm2_cpu.sh", marks=pytest.mark.slow),
        "grpo_smollm2_cpu.sh",
    ],
)
def test_smollm2_on_two_cores(script: str, places: dict[str, str], tmp_path: Path) -> None:
    printed = dry_run(script, tmp_path, **places, PROMPTS="4")
    check_documented(script, printed)
    assert "rollout_batch_size: 4" in printed
    assert not (tmp_path / "run with space").exists()


def test_prompts_are_rendered_as_the_model_has_them(assets: Path, tmp_path: Path) -> None:
    shutil.copytree(assets / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": [{"role": "user", "content": "7 words"}], "chosen": "c"}\n')
    places = [str(tmp_path / name) for name in ("model", "rows.jsonl", "texts.jsonl")]
    subprocess.run([sys.executable, "examples/rendered.py", *places], cwd=ROOT, check=True, timeout=60)
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "<user>7 words<answer>", "chosen": "c"}]


@pytest.mark.slow
def test_the_whole_of_rlhf_on_two_cores(assets: Path, tmp_path: Path) -> None:
    """Its last stage; that those before it are done is shown by what they leave."""
    out, (words, score_model) = tmp_path / "a run", (tmp_path / name for name in ("words", "score model"))
    make_reward_model(score_model, vocab_size=len(AutoTokenizer.from_pretrained(assets / "model")))
    for stage, model in (("sft", assets / "model"), ("rm", score_model)):
        shutil.copytree(assets / "model", out / stage / "hf", ignore=shutil.ignore_patterns("model.safetensors"))
        shutil.copytree(model, out / stage / "hf", dirs_exist_ok=True)
        (out / stage / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    (out / "pairs.jsonl").touch()
    words.mkdir()
    for name in ("prompts.jsonl", "heldout_prompts.jsonl"):
        (words / name).write_text('{"input": "a b", "label": "b"}\n')
    given = {"OUT": str(out), "DATA": str(words), "MODEL": str(assets / "model")}
    flags = ("--no-normalize_reward", "--prompt_max_len", "16", "--generate_max_len", "8")  # a tiny model
    printed = dry_run("rlhf_smollm2_cpu.sh", tmp_path, *flags, **given)
    ranks = re.findall(r"^(actor\+reference|reward) +\d \((\w+)\)", printed, re.MULTILINE)
    assert ranks == [("actor+reference", "dp0"), ("actor+reference", "dp1"), ("reward", "pp0"), ("reward", "pp1")]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["rejection_sampling_demo.sh", "iterative_dpo_demo.sh"])
def test_the_demos_of_loops(script: str, tmp_path: Path) -> None:
    printed = dry_run(script, tmp_path, DATA=str(tmp_path / "some data"))
    assert "2 rounds of 400 prompts x 16 samples, 150 to evaluate on" in printed
    assert not (tmp_path / "run with space").exists()
