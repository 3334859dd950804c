"""What does not fit a device is refused with changes that make it fit."""

import re
from pathlib import Path

import pytest

from megarlhf.cli import train_ppo
from megarlhf.cli.memory import plan_memory
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict, parse
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.supervised_arguments import SFTConfig
from megarlhf.formats.huggingface import read_config

GIB = 2**30


@pytest.fixture
def flags(llama_3_8b: Path, tmp_path: Path) -> list[str]:
    """PPO of Llama 3 8B on eight GPUs."""
    data = tmp_path / "math.jsonl"
    data.write_text('{"input": "1 + 1", "label": "2"}\n')
    given = {
        "--pretrain": llama_3_8b,
        "--prompt_data": data,
        "--save": tmp_path / "run",
        "--reward_rule": "math",
        "--actor_num_gpus_per_node": 8,
        "--tensor-model-parallel-size": 4,
        "--vllm_num_engines": 8,
        "--max-tokens-per-micro-batch": 16384,
        "--generate_max_len": 2048,
    }
    return [str(word) for pair in given.items() for word in pair] + ["--bf16", "--sequence-parallel", "--dry-run"]


def test_a_teacher_takes_memory_beside_its_student(llama_3_8b: Path, tmp_path: Path) -> None:
    """Llama 3 8B learns from itself at TP2, in bfloat16."""
    given = {"pretrain": str(llama_3_8b), "dataset": str(tmp_path), "save": str(tmp_path / "run"), "bf16": True}
    given |= {"tensor_model_parallel_size": 2, "num_gpus_per_node": 2}
    model = read_config(llama_3_8b)
    (alone,) = plan_memory(from_dict(SFTConfig, given), [model]).tables
    (beside,) = plan_memory(from_dict(KDConfig, given | {"teacher_model": str(llama_3_8b)}), [model, model]).tables
    before, update, own = beside.phases["experience"], beside.phases["update"], alone.phases["update"]
    assert before["actor", "teacher"] == own["actor", "parameters"] > 8e9 and ("actor", "teacher") not in update
    assert update["actor", "teacher output"] == before["actor", "teacher output"] == 2 * 128256 // 2 * 4096
    hidden = 8 * 2048 * 4096 * (4 + 4 + 2)  # what the teacher's output layer takes, of 8 rows: twice, then in bfloat16
    assert update["actor", "logits"] == 2 * own["actor", "logits"] + hidden
    assert update.items() - own.items() == {
        (key, update[key]) for key in update if key[1] in ("teacher output", "logits")
    }
    adapters = {"lora_rank": 8, "load_in_4bit": True, "teacher_model": str(llama_3_8b)}
    (in_4_bits,) = plan_memory(from_dict(KDConfig, given | adapters), [model, model]).tables
    assert in_4_bits.phases["experience"]["actor", "teacher"] == before["actor", "teacher"], "it has none of them"
    top = given | {"teacher_model": str(llama_3_8b), "teacher_top_k": 64}
    (once,) = plan_memory(from_dict(KDConfig, top), [model, model]).tables
    assert once.phases["experience"]["actor", "teacher"] == before["actor", "teacher"]
    assert once.phases["update"] == own


MIB = 2**20
GPUS, ON_CPU = ("--gpu_memory_gib", "79"), ()
BOTH = ("actor", "rollout")


@pytest.mark.parametrize(
    ("options", "holders", "taken"),
    [
        (GPUS, ("actor",), 2 * 512 * MIB),  # engines read them there
        ((*GPUS, "--update_weight_buffer_mib", "96"), ("actor",), 2 * 96 * MIB),
        # One holds all weights: 8,030,261,248 in bfloat16.
        ((*GPUS, "--update_weight_buffer_mib", "20000"), ("actor",), 2 * 2 * 8_030_261_248),
        ((*GPUS, "--no_colocate_all_models"), BOTH, 2 * 512 * MIB),  # sent
        ((*GPUS, "--vllm_tensor_parallel_size", "2"), (), 0),  # 8 of the engines' 16 GPUs have no rank: shared memory
        ((*GPUS, "--no_colocate_all_models", "--weight_transport", "shared_memory"), (), 0),
        (ON_CPU, (), 0),  # shared memory
        ((*ON_CPU, "--weight_transport", "broadcast"), BOTH, 2 * 512 * MIB),
    ],
)
def test_a_sync_takes_the_buckets_of_its_transport(
    flags: list[str], llama_3_8b: Path, options: tuple[str, ...], holders: tuple[str, ...], taken: int
) -> None:
    config, _ = parse(PPOConfig, [*flags, *options], "ppo")
    tables = plan_memory(config, [read_config(llama_3_8b)] * 2).tables
    held: dict[str, int] = {}
    for table in tables:
        for phase, column in table.phases.items():
            found = {role: size for (role, part), size in column.items() if part == "weight buckets"}
            expected = {role: taken for role in holders if role in table.roles} if phase == "sync" else {}
            assert found == expected, (table.devices, phase)
            held |= found
    assert held == dict.fromkeys(holders, taken)


def refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line of the error; notes may come before it, and the table comes after."""
    assert train_ppo.main(flags) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: gpu_memory_gib=" in line)
    return line


def test_with_adapters_policy_and_reference_have_one_copy_of_the_base(
    flags: list[str], llama_3_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama 3 8B at TP4: 8.03 billion weights; an adapter of rank 16 has 16 numbers for each input and output."""
    assert "activations" in refused([*flags, "--gpu_memory_gib", "40"], capsys)
    assert train_ppo.main([*flags, "--gpu_memory_gib", "40", "--lora_rank", "16"]) == 0
    assert "actor    reference" not in capsys.readouterr().out
    config, _ = parse(PPOConfig, [*flags, "--gpu_memory_gib", "79", "--lora_rank", "16"], "ppo")
    (table,) = plan_memory(config, [read_config(llama_3_8b)] * 2).tables
    shapes = {(4096, 4096): 2, (4096, 1024): 2, (4096, 14336): 3}  # the last: gate, up and down, by turns
    each = sum(16 * (a + b) * count for (a, b), count in shapes.items()) * 32
    held = {key: size for phase in table.phases.values() for key, size in phase.items()}
    assert held["actor", "parameters"] == pytest.approx(2 * (8_030_261_248 + 4 * each) / 4, rel=0.01)
    for part, number_bytes in (("gradients", 4), ("optimizer", 12 / 2)):  # two replicas share the optimizer
        assert each / 4 * number_bytes < held["actor", part] < each * number_bytes
    assert not [role for role, part in held if part == "reference"]


def test_a_run_that_fits_says_what_is_left(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_ppo.main([*flags, "--gpu_memory_gib", "79"]) == 0
    assert "GiB of 79 left" in capsys.readouterr().out
    assert train_ppo.main(flags) == 0
    assert "note: no GPU here and no gpu_memory_gib: compared with no device's memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("memory", "changes", "words", "remedies"),
    [
        ("50", (), "phase update actor takes", ("max_tokens_per_micro_batch=", "recompute_granularity=full")),
        ("40", (), "most of it activations of role actor", ("optimizer_cpu_offload=True",)),
        ("35", (), "most of it activations of role actor", (" with ", " with ")),
        (
            "79",
            ("--optimizer_cpu_offload", "--host_memory_gib", "700"),
            "host_memory_gib=700; phase save takes",
            ("vllm_tensor_parallel_size=2", "tensor_model_parallel_size=8"),
        ),
        (
            "79",
            ("--no_use_distributed_optimizer",),
            "most of it optimizer of role actor",
            ("use_distributed_optimizer=True", "max_tokens_per_micro_batch=8192"),
        ),
        (
            "79",
            ("--vllm_gpu_memory_utilization", "0.97"),
            "phase rollout takes",
            ("vllm_gpu_memory_utilization=0.95",),
        ),
        (
            "79",
            ("--vllm_gpu_memory_utilization", "0.15"),
            "role rollout: 14.96 GiB of weights leave 0.00 GiB",
            ("vllm_gpu_memory_utilization=0.2", "vllm_tensor_parallel_size=2"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_remedies_that_do(
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    llama_3_8b: Path,
    memory: str,
    changes: tuple[str, ...],
    words: str,
    remedies: tuple[str, ...],
) -> None:
    given = [*flags, "--gpu_memory_gib", memory, *changes]
    said = refused(given, capsys)
    assert f"gpu_memory_gib={memory}" in said and words in said
    offered = said.rsplit(": set ", 1)[1].split(" or ")
    assert all(remedy in offer for remedy, offer in zip(remedies, offered, strict=False)), offered
    hf = read_config(llama_3_8b)
    hf.tie_word_embeddings = False
    for offer in offered:  # taken at its word, it fits with the peak that is named
        assert (named := re.search(r"\(peak ([\d.]+) GiB\)$", offer)) is not None
        more = [f"--{name}={value}" for name, value in re.findall(r"(\w+)=([\w.]+)", offer) if value != "True"]
        more += [f"--{name}" for name in re.findall(r"(\w+)=True", offer)]
        kept = [word for word in given if word != "--no_use_distributed_optimizer" or "distributed" not in offer]
        config, _ = parse(PPOConfig, [*kept, *more], "ppo")
        plan = plan_memory(config, [hf, hf])
        assert plan.misfits == [] and f"{plan.peak / GIB:.2f}" == named[1]
