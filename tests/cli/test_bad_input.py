"""Mistakes end a program with status 2 and a sentence that names the key, before Ray or any worker starts."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from megarlhf.cli import train_ppo_ray, train_sft
from megarlhf.cli.disk import check_shared_memory
from megarlhf.cli.run import check_weights
from megarlhf.config.layouts import LayoutArguments
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.formats import shared_memory
from megarlhf.formats.huggingface import read_config
from tests.cluster.runs import SMALL, write_inputs
from tests.tiny_models import make_model

Flags = dict[str, str | None]


@pytest.fixture
def flags(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flags:
    """Flags of a run that would start; starting Ray is an error here."""

    class Forbidden:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"ray.{name} was called")

    monkeypatch.setitem(sys.modules, "ray", Forbidden())
    monkeypatch.delitem(sys.modules, "megarlhf.cluster.ray_processes", raising=False)
    inputs = SMALL | write_inputs(tmp_path) | {"--pretrain": str(assets / "model"), "--save": str(tmp_path / "run")}
    return inputs | {"--train-iters": "1", "--actor_num_gpus_per_node": "2"}


def fail(flags: Flags, capsys: pytest.CaptureFixture[str]) -> str:
    """Run, expect status 2, return what was said."""
    words = [word for flag, value in flags.items() for word in ([flag] if value is None else [flag, value])]
    try:
        status = train_ppo_ray.main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert status == 2, captured
    return captured.err


def test_all_configuration_errors_come_together(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fail(
        flags
        | {
            "--tensor-model-parallel-size": "3",
            "--rollout_batch_size": "7",
            "--prompt_data": str(tmp_path / "nowhere.jsonl"),
            "--top_p": "0.9",
        },
        capsys,
    )
    for key in ("tensor_model_parallel_size=3", "rollout_batch_size", "prompt_data", "top_p=0.9", "actor_num_gpus"):
        assert key in said, key


def test_unknown_flag_names_the_nearest(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--actor_learning_rate" in fail(flags | {"--actor_learning_rat": "1"}, capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--label_key": "answer"}, ("label_key=answer is in no row of",)),
        ({"--apply_chat_template": None}, ("apply_chat_template=True, but tokenizer=", "set tokenizer_chat_template")),
        ({"--pretrain": "/nowhere/model"}, ("pretrain=/nowhere/model",)),
        ({"--input_key": "question"}, ("input_key=question", "input", "label")),
        ({"--advantage_estimator": "rloo", "--n_samples_per_prompt": "1"}, ("n_samples_per_prompt=1", "rloo")),
        ({"--pipeline-model-parallel-size": "3"}, ("pipeline_model_parallel_size=3",)),
        ({"--global-batch-size": "5"}, ("global_batch_size=5",)),
        ({"--prompt_max_len": "1"}, ("prompt_max_len=1", "all 24 rows", "all 4 rows", "4 tokens")),
        ({"--load": "/nowhere"}, ("load=/nowhere",)),
        ({"--save": "/dev/null/run"}, ("save=/dev/null/run",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_one_mistake(flags: Flags, capsys: pytest.CaptureFixture[str], change: Flags, words: tuple[str, ...]) -> None:
    said = fail(flags | change, capsys)
    for word in words:
        assert word in said


@pytest.mark.parametrize("dry_run", [{}, {"--dry-run": None}], ids=["run", "dry-run"])
def test_a_dry_run_makes_every_check_of_a_run(
    flags: Flags, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: Flags
) -> None:
    """Data, weights, checkpoint and reward code, all that is read after the configuration, in one answer."""
    cut = shutil.copytree(assets / "model", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    (tmp_path / "raises.py").write_text("def reward_func(queries, prompts, labels): ...\n1 / 0\n")
    bad = {"--pretrain": str(cut), "--prompt_max_len": "1", "--load": str(checkpoint(tmp_path / "old"))}
    said = fail(flags | bad | {"--reward_function": str(tmp_path / "raises.py")} | dry_run, capsys)
    for words in (f"pretrain={cut}", "prompt_max_len=1", "hidden_size: saved 9999", "ZeroDivisionError"):
        assert words in said, words
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", ["ppo", "sft"])
def test_a_run_that_does_not_fit_is_told_with_the_other_mistakes(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    small = {"--gpu_memory_gib": "0.001", "--load": str(checkpoint(tmp_path / "old"))}
    if program == "ppo":
        said = fail(flags | small | {"--prompt_max_len": "1"}, capsys)
    else:
        names = {"--pretrain", "--save"}
        given = {name: value for name, value in flags.items() if name in names} | small | {"--max_len": "2"}
        given |= {"--dataset": flags["--prompt_data"], "--output_key": "label"}
        assert train_sft.main([str(word) for pair in given.items() for word in pair]) == 2
        said = capsys.readouterr().err
    for words in ("hidden_size: saved 9999", "gpu_memory_gib=0.001; ", "max_len=", " drops all "):
        assert words in said, words


def test_too_little_disk(flags: Flags, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a run, and a note of a dry run, which may rehearse for another machine."""
    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if "/dev/shm" not in str(path) else plenty)
    plenty = usage._replace(free=10**12)
    said = fail(flags | {"--advantage_estimator": "gae"}, capsys)
    assert f"save={flags['--save']}; the disk of" in said and "1 checkpoint(s)" in said and "9.31e-05 GiB free" in said
    words = [
        word for item in (flags | {"--advantage_estimator": "gae", "--dry-run": None}).items() for word in item if word
    ]
    assert train_ppo_ray.main(words) == 0
    assert f"note: save={flags['--save']}; the disk of" in capsys.readouterr().err


def test_an_average_takes_disk(
    flags: Flags, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 bytes a weight beside the 16 of a checkpoint, and another export."""
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = ["--pretrain", flags["--pretrain"], "--save", flags["--save"], "--dataset", flags["--prompt_data"]]
    sizes = []
    for more in ([], ["--enable_ema"]):
        assert train_sft.main([*map(str, words), "--output_key=label", "--max_len=32", "--dry-run", *more]) == 0
        said = capsys.readouterr().err
        assert ("GiB for its average" in said) == bool(more)
        sizes.append([float(number) for number in re.findall(r"([\d.e-]+) GiB for", said)])
    (checkpoint, exported), (with_average, *both) = sizes
    assert with_average == pytest.approx(checkpoint * 20 / 16, rel=0.01) and both == [exported, exported]


def test_unsupported_architecture_lists_the_supported(
    flags: Flags, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(assets / "model", tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (other / "config.json").write_text(json.dumps(config))
    said = fail(flags | {"--critic_pretrain": str(other)}, capsys)
    assert f"critic_pretrain={other}; config.json: architecture GPT2LMHeadModel has no table" in said
    assert "LlamaForCausalLM" in said and "Qwen3ForCausalLM" in said


def test_a_reward_model_generates_nothing(
    flags: Flags, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(assets / "model", tmp_path / "reward")
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (other / "config.json").write_text(json.dumps(config))
    said = fail(flags | {"--pretrain": str(other)}, capsys)
    assert f"pretrain={other}; architectures=['LlamaForSequenceClassification'] generate no text" in said


def test_missing_tokenizer(flags: Flags, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = shutil.copytree(assets / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in fail(flags | {"--pretrain": str(bare)}, capsys)


def test_truncated_weights(flags: Flags, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = shutil.copytree(assets / "model", tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"pretrain={cut}" in fail(flags | {"--pretrain": str(cut)}, capsys)


def test_too_little_shared_memory(
    flags: Flags, assets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = (assets / "model" / "model.safetensors").stat().st_size  # float32 already
    monkeypatch.setattr(shared_memory, "free_shared_memory", lambda: num_bytes * 3 // 4)
    assert "do not fit into /dev/shm" in fail(flags, capsys)
    model = read_config(assets / "model")
    check_shared_memory(model, bf16=True, object_store_bytes=0)  # half as large
    check_shared_memory(model, bf16=True, object_store_bytes=num_bytes // 5)
    with pytest.raises(ValueError, match="and Ray's object store of"):
        check_shared_memory(model, bf16=True, object_store_bytes=num_bytes // 3)


@pytest.mark.parametrize(
    "text",
    ["def score(q): return 0\n", "def reward_func(queries, prompts, labels)\n    return 1\n"],
    ids=["absent", "syntax"],
)
def test_reward_function(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    said = fail(flags | {"--reward_function": str(tmp_path / "bad.py")}, capsys)
    assert "reward_function" in said and "reward_func" in said


def checkpoint(root: Path, *, complete: bool = True, vocab_size: int = 40) -> Path:
    """A run directory whose checkpoint says little."""
    directory = root / "checkpoints" / "iter_0000003"
    directory.mkdir(parents=True)
    (root / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    if complete:
        identity = {"architecture": "LlamaForCausalLM", "vocab_size": vocab_size, "hidden_size": 9999}
        (directory / "run_state.json").write_text(json.dumps({"step": 3, "identity": identity}))
    return root


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [(None, "", "no complete checkpoint"), ("release", "release", "'release', not a step"), ("9", "9\n", "incomplete")],
)
def test_checkpoint_that_its_pointer_does_not_name(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None, text: str, words: str
) -> None:
    pointer = checkpoint(tmp_path / "old") / "checkpoints" / "latest_checkpointed_iteration.txt"
    pointer.unlink() if name is None else pointer.write_text(text)
    said = fail(flags | {"--load": str(tmp_path / "old")}, capsys)
    assert f"load={tmp_path / 'old'}" in said and words in said


def test_incomplete_checkpoint(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fail(flags | {"--load": str(checkpoint(tmp_path / "old", complete=False))}, capsys)
    assert f"load={tmp_path / 'old'}" in said and "incomplete" in said


def test_checkpoint_of_another_model(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fail(flags | {"--load": str(checkpoint(tmp_path / "old"))}, capsys)
    assert "another model or run" in said and "hidden_size: saved 9999" in said


def test_dry_run_prints_configuration_and_plan(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    assert train_ppo_ray.main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "actor_learning_rate: 0.001" in printed
    model = flags["--pretrain"]
    config = json.loads((Path(str(model)) / "config.json").read_text())
    vocab_size = config["vocab_size"]
    assert f"tokenizer: {model} ({vocab_size} tokens; vocab_size={vocab_size})" in printed
    assert "chat template: none (apply_chat_template=False)" in printed
    assert re.search(rf"stop token: {config['eos_token_id']} '.+' \(tokenizer, generation_config.json\)", printed)
    assert "dtype: float32 (bf16=False); config.json of pretrain says torch.float32" in printed
    rows = [
        line.split() for line in printed.splitlines() if line.startswith(("actor+reference", "critic ", "rollout "))
    ]
    assert [row[0] for row in rows if row[1] in "01"] == ["actor+reference"] * 2 + ["critic"] * 2 + ["rollout"]
    assert not Path(flags["--save"] or "").exists(), "a dry run writes nothing"


def with_token(model: Path, target: Path, token: str) -> Path:
    """The model with another tokenizer: one token more, for which it has no embedding."""
    shutil.copytree(model, target)
    tokenizer = load_tokenizer(str(model), chat_template=None)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(target)
    return target


def test_tokens_and_stop_tokens_past_the_vocabulary(
    flags: Flags, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_token(assets / "model", tmp_path / "more", "<x>")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    (tmp_path / "x.jsonl").write_text('{"input": "1", "label": "1"}\n{"input": "1<x>", "label": "1"}\n')
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, size + 3]}))
    said = fail(flags | {"--pretrain": str(model), "--eval_data": str(tmp_path / "x.jsonl")}, capsys)
    assert f"vocab_size={size} of pretrain leaves out the stop tokens {size + 3}" in said
    assert f"{size} '<x>' in row 1 (line 2) of {tmp_path / 'x.jsonl'}" in said


def test_supervised_tokens_past_the_vocabulary(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_token(assets / "model", tmp_path / "more", "<x>")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    (tmp_path / "a.jsonl").write_text('{"input": "1", "output": "1"}\n')
    (tmp_path / "b.jsonl").write_text('{"input": "1", "output": "<x>"}\n')
    flags = {"--pretrain": model, "--save": tmp_path / "run", "--output_key": "output", "--train-iters": 1}
    flags |= {"--dataset": tmp_path / "a.jsonl", "--eval_dataset": tmp_path / "b.jsonl"}
    flags |= {"--global-batch-size": 1, "--micro-batch-size": 1, "--max_len": 16}
    assert train_sft.main([str(word) for pair in flags.items() for word in pair]) == 2
    assert f"{size} '<x>' in row 0 (line 1) of {tmp_path / 'b.jsonl'}" in capsys.readouterr().err
    flags["--eval_dataset"] = tmp_path / "a.jsonl"
    assert train_sft.main([*(str(word) for pair in flags.items() for word in pair), "--dry-run"]) == 0
    assert re.search(r"end of every row: \d+ '.+' \(the tokenizer's EOS\)", capsys.readouterr().out)


def test_what_transformer_engine_cannot_do_is_said_before_the_weights_are_read(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", family="gemma2")
    check_weights([("pretrain", str(model_dir), LayoutArguments(), "lm")], transformer_impl="local")
    with pytest.raises(ValueError, match="attn_logit_softcapping=.*set transformer_impl=local"):
        check_weights([("pretrain", str(model_dir), LayoutArguments(), "lm")], transformer_impl="transformer_engine")
