"""Command lines that OpenRLHF 0.5's users know run as they stand there: names of models and data alone are replaced."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megarlhf.cli.flags import PROGRAMS
from megarlhf.config.checks import check_supervised
from megarlhf.config.command_line import parse, to_dict
from tests.cluster.runs import Run, metrics

# D: data, M, R: models, P: directory. The first two are its README's, the others its examples/scripts'.
LINES = {
    "sft": r"""--max_len 4096 --dataset D --input_key question --output_key response
        --input_template $'User: {}\nAssistant: ' --train_batch_size 256 --micro_train_batch_size 2
        --max_samples 500000 --pretrain M --save_path P --save_steps -1 --logging_steps 1 --eval_steps -1
        --zero_stage 2 --max_epochs 1 --packing_samples --bf16 --flash_attn --learning_rate 5e-6
        --gradient_checkpointing --use_wandb TOKEN""",
    "rm": """--save_path P --save_steps -1 --logging_steps 1 --eval_steps -1 --train_batch_size 256
        --micro_train_batch_size 1 --pretrain M --bf16 --max_epochs 1 --max_len 8192 --zero_stage 3
        --learning_rate 9e-6 --dataset D --apply_chat_template --chosen_key chosen --rejected_key rejected --flash_attn
        --packing_samples --gradient_checkpointing --use_wandb TOKEN""",
    "dpo": """--save_path P --save_steps -1 --logging_steps 1 --eval_steps -1 --train_batch_size 256
        --micro_train_batch_size 1 --pretrain M --bf16 --max_epochs 1 --max_len 8192 --zero_stage 3
        --learning_rate 5e-7 --beta 0.1 --dataset D --apply_chat_template --chosen_key chosen --rejected_key rejected
        --flash_attn --load_checkpoint --packing_samples --gradient_checkpointing""",
    "kto": """--save_path P --save_steps -1 --logging_steps 1 --eval_steps -1 --train_batch_size 64
        --micro_train_batch_size 1 --pretrain M --bf16 --max_epochs 1 --max_len 8192 --zero_stage 3
        --learning_rate 5e-7 --dataset D --input_key instruction --output_key response --label_key score --flash_attn
        --beta 0.1 --max_samples 1024 --gradient_checkpointing""",
    "kd": """--max_len 2048 --dataset D --input_key question --output_key response --train_batch_size 256
        --micro_train_batch_size 2 --max_samples 500000 --pretrain M --teacher_model R --save_path P --save_steps -1
        --logging_steps 1 --eval_steps -1 --zero_stage 2 --max_epochs 1 --bf16 --flash_attn --kd_coef 0.4
        --learning_rate 5e-6 --teacher_offload --gradient_checkpointing""",
    "prm": """--save_path P --save_steps 500 --logging_steps 1 --eval_steps -1 --train_batch_size 256
        --micro_train_batch_size 8 --pretrain M --bf16 --max_epochs 1 --max_len 8192 --zero_stage 3
        --learning_rate 1e-6 --dataset D --input_key input --label_key value --flash_attn --load_checkpoint
        --gradient_checkpointing --packing_samples --wandb_group prm --placeholder_token k --reward_tokens + -""",
}
ALSO = [  # what may stand on these lines too, and what it is here
    ("sft", "--pretrain_mode", {"pretrain_mode": True}),
    ("sft", "--ring_attn_size 2 --ring_head_stride 2", {"context_parallel_size": 2}),
    ("sft", "--apply_chat_template --tokenizer_chat_template {{m}}", {"tokenizer_chat_template": "{{m}}"}),
    ("rm", "--value_head_prefix score", {"value_head_prefix": "score"}),
    ("dpo", "--ipo", {"ipo": True}),
    ("dpo", "--label_smoothing 0.1", {"label_smoothing": 0.1}),
    ("dpo", "--ref_offload --nll_loss_coef 0.2", {"nll_loss_coef": 0.2}),
]


def words_of(program: str, directory: Path) -> list[str]:
    """A line's words, as a shell makes them, with names of this machine."""
    line = " ".join(LINES[program].split("\n"))
    words = subprocess.run(["bash", "-c", rf"printf '%s\0' {line}"], capture_output=True, text=True, check=True).stdout
    names = {"D": "data.jsonl", "M": "model", "R": "model", "P": "run"}
    return [str(directory / names[word]) if word in names else word for word in words.split("\0")[:-1]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and data as far as the configuration's check looks."""
    monkeypatch.setenv("WANDB_API_KEY", "")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 42}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 8192}))
    (tmp_path / "data.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize("program", LINES)
def test_the_line_is_understood(place: Path, program: str) -> None:
    config, dry_run = parse(PROGRAMS[program], words_of(program, place), program)
    assert check_supervised(config) == [] and not dry_run
    values, words = to_dict(config), words_of(program, place)
    given = dict(zip(words, words[1:], strict=False))
    assert values["global_batch_size"] == int(given["--train_batch_size"])
    assert values["micro_batch_size"] == int(given["--micro_train_batch_size"])
    assert values["learning_rate"] == float(given["--learning_rate"]) and values["max_len"] == int(given["--max_len"])
    assert values["bf16"] and values["recompute_granularity"] == "full" and values["max_epochs"] == 1
    assert values["eval_interval"] is None, "at the end of each epoch"
    assert values["save_interval"] == (500 if program == "prm" else None)
    assert values["use_wandb"] is ("TOKEN" in words) and values["load_checkpoint"] is ("--load_checkpoint" in words)
    if program == "sft":
        assert values["input_template"] == "User: {}\nAssistant: "
    if program == "prm":
        assert values["reward_tokens"] == ("+", "-") and values["wandb_group"] == "prm"


@pytest.mark.parametrize(("program", "more", "expected"), ALSO)
def test_what_may_stand_there_too(
    place: Path, monkeypatch: pytest.MonkeyPatch, program: str, more: str, expected: dict[str, object]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun's; a ring takes ranks
    words = words_of(program, place)
    if "--apply_chat_template" in more:  # one of the two renders a prompt
        start = words.index("--input_template")
        del words[start : start + 2]
    config, _ = parse(PROGRAMS[program], [*words, *shlex.split(more)], program)
    assert check_supervised(config) == [] and expected.items() <= to_dict(config).items()


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["sft", "rm"])
def test_the_line_runs_to_its_report(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    model = shutil.copytree(assets / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (model / "config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    rows: list[dict[str, object]] = [{"question": f"{i}=", "response": str(i % 7)} for i in range(256)]
    if program == "rm":
        rows = [{"chosen": chat(f"{i}=", f"{i % 7}"), "rejected": chat(f"{i}=", f"{i % 7 + 1}")} for i in range(256)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = Run([sys.executable, "-m", f"megarlhf.cli.train_{program}", *words_of(program, tmp_path)])
    assert process.wait(timeout=600) == 0, process.read()
    logged = metrics(tmp_path / "run")
    assert list(logged) == [1] and f"{program}/loss" in logged[1]
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert "TOKEN" not in process.read() and "other users of this machine can read a key" in process.read()
