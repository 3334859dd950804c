"""A checkpoint's small files, damaged in many ways: status 2, and a sentence that names the file."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cli import run_parity, run_supervised  # noqa: F401  (their ranks are forbidden below)
from megarlhf.cli.main import main
from megarlhf.cli.run import check_weights
from megarlhf.config.layouts import LayoutArguments
from megarlhf.data.tokenizer import load_tokenizer, stop_tokens
from megarlhf.formats.huggingface import read_config
from tests.cluster.runs import SMALL, write_inputs

Damage = Callable[[Path], None]


def text(content: str | bytes) -> Damage:
    """Put this into the file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda path: (path.write_bytes(data), None)[1]


def keys(**changes: Any) -> Damage:
    """Other values in a JSON object; `...` takes a key out."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Another header of a safetensors file."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        new = json.dumps(change(content) or content).encode()
        path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])

    return damage


def own_template(template: Any) -> Damage:
    """A template in tokenizer_config.json alone."""

    def damage(path: Path) -> None:
        path.with_name("chat_template.jinja").unlink()
        keys(chat_template=template)(path)

    return damage


BROKEN = {"empty": "", "list": "[1]", "null": "null", "half": '{"a": ', "bytes": b"\xff\xfe{}", "deep": "[" * 100000}
CONFIG: dict[str, Damage] = {
    **{name: text(content) for name, content in BROKEN.items()},
    "object": text("{}"),
    **{
        f"{key}={value!r}": keys(**{key: value})
        for key, values in {
            "rms_norm_eps": (1, "1e-5", None),
            "hidden_size": (..., "64", 0, -64, 64.0, None, [64]),
            "num_attention_heads": ("4", 0, 3, None),
            "num_key_value_heads": ("4", 0, 3),
            "num_hidden_layers": ("4", 0, 3, 9),
            "vocab_size": ("40", 0, 39, None),
            "intermediate_size": ("40", 0, 100),
            "head_dim": ("32", 0, 16),
            "max_position_embeddings": ("64", 0, None),
            "rope_parameters": (
                [],
                "default",
                {"rope_type": 5},
                {"rope_type": "llama3"},
                {"rope_type": "yarn", "factor": "x"},
                {"rope_type": "default", "rope_theta": "x"},
                {"rope_type": "default", "rope_theta": 0},
            ),
            "architectures": ("LlamaForCausalLM", [1], [], None, ["NoSuchForCausalLM"], ["Qwen2ForCausalLM"]),
            "model_type": (5, "no_such_type", "qwen2", ...),
            "tie_word_embeddings": ("yes", 1.5),
            "dtype": ("float99",),
            "hidden_act": (5, "gelu", "no_such"),
            "eos_token_id": ("x", 1.5),
            "quantization_config": ({"quant_method": "fp8"}, 5),
            "attention_bias": (True, "yes"),
            "initializer_range": ("x", 7),
        }.items()
        for value in values
    },
}
INDEX: dict[str, Damage] = {
    **{name: text(content) for name, content in BROKEN.items()},
    "object": text("{}"),
    **{f"weight_map={value!r}": keys(weight_map=value) for value in ([], None, 5, {"a": 3}, {"a": None}, {"a": ["b"]})},
    "absent file": keys(weight_map={"model.norm.weight": "model-00001-of-00002.safetensors"}),
    "folder": keys(weight_map={"model.norm.weight": "."}),
    "absent tensor": keys(weight_map={"no.such.weight": "model.safetensors"}),
    "left out": keys(weight_map={"model.norm.weight": "model.safetensors"}),
}
NORM = "model.norm.weight"
WEIGHTS: dict[str, Damage] = {
    "empty": text(""),
    "text": text("version https://git-lfs.github.com/spec/v1\n" * 3),
    "zeros": text(b"\0" * 64),
    "large header": text(b"\xff" * 64),
    "no JSON": text(b"\x08" + b"\0" * 7 + b"{'a': 1}"),
    "cut": lambda path: (path.write_bytes(path.read_bytes()[:-8]), None)[1],
    "more": lambda path: (path.write_bytes(path.read_bytes() + b"\0" * 8), None)[1],
    "list": header(lambda _: [1]),
    "dtype": header(lambda h: h[NORM].update(dtype="F12")),
    "shape": header(lambda h: h[NORM].update(shape=["x"])),
    "numbers": header(lambda h: h[NORM].update(shape=[3])),
    "offsets": header(lambda h: h[NORM].update(data_offsets=[0, 4])),
    "no entry": header(lambda h: h.update({NORM: 5})),
    "metadata": header(lambda h: h.update(__metadata__=5)),
}
TOKENIZER = {
    "tokenizer.json": {name: text(content) for name, content in BROKEN.items() if name != "deep"}
    | {"object": text("{}"), "model": keys(model=5), "added_tokens": keys(added_tokens=5)},
    "tokenizer_config.json": {name: text(content) for name, content in BROKEN.items()}
    | {"chat_template": own_template(5), "class": keys(tokenizer_class=5), "eos": keys(eos_token=5)},
    "special_tokens_map.json": {name: text(content) for name, content in BROKEN.items()},
    "chat_template.jinja": {"bytes": text(b"\xff\xfe")},
    "generation_config.json": {name: text(content) for name, content in BROKEN.items()}
    | {f"eos_token_id={value!r}": keys(eos_token_id=value) for value in ("x", 1.5, [None], {})},
}
MODEL = {"config.json": CONFIG, "model.safetensors.index.json": INDEX, "model.safetensors": WEIGHTS}


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def model(assets: Path, tmp_path: Path) -> Path:
    model = shutil.copytree(assets / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def damaged(files: dict[str, dict[str, Damage]]) -> list[Any]:
    """(file, damage) of a table, named after both."""
    return [
        pytest.param(file, damage, id=f"{file}-{name}"[:70])
        for file, damages in files.items()
        for name, damage in damages.items()
    ]


def assert_one_sentence(error: BaseException, file: str) -> None:
    said = str(error)
    assert file in said and "\n" not in said and len(said) < 2000, said


def test_the_undamaged_model_is_taken(model: Path) -> None:
    check_weights([("pretrain", str(model), LayoutArguments(), "lm")], transformer_impl="local")
    tokenizer = load_tokenizer(str(model), chat_template=None)
    assert stop_tokens(tokenizer, str(model), read_config(model))


@pytest.mark.parametrize(("file", "damage"), damaged(MODEL))
def test_model_files(model: Path, file: str, damage: Damage) -> None:
    damage(model / file)
    with pytest.raises(ValueError) as raised:
        check_weights([("pretrain", str(model), LayoutArguments(), "lm")], transformer_impl="local")
    assert_one_sentence(raised.value, file)


@pytest.mark.parametrize(("file", "damage"), damaged(TOKENIZER))
def test_tokenizer_files(model: Path, file: str, damage: Damage) -> None:
    damage(model / file)
    with pytest.raises(ValueError) as raised:
        tokenizer = load_tokenizer(str(model), chat_template=None)
        stop_tokens(tokenizer, str(model), read_config(model))
    assert_one_sentence(raised.value, file)


@pytest.fixture
def flags(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Arguments of every program that would start with an undamaged model; starting anything is an error here."""

    class Forbidden:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"ray.{name} was called")

    def forbidden(*_: object, **__: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setitem(sys.modules, "ray", Forbidden())
    monkeypatch.delitem(sys.modules, "megarlhf.cluster.ray_processes", raising=False)
    for program in ("run_supervised", "run_parity"):
        monkeypatch.setattr(f"megarlhf.cli.{program}.run_local_ranks", forbidden)
    monkeypatch.delenv("MEGARLHF_PARITY", raising=False)
    (tmp_path / "sft.jsonl").write_text('{"input": "1=", "output": "1"}\n' * 4)
    ppo = SMALL | write_inputs(tmp_path) | {"--pretrain": str(model), "--save": str(tmp_path / "run")}
    sft = {"--pretrain": str(model), "--dataset": str(tmp_path / "sft.jsonl"), "--output_key": "output"}
    sft |= {"--save": str(tmp_path / "run"), "--num_gpus_per_node": "2", "--max_len": "32", "--learning_rate": "1e-3"}
    chat = ["--apply_chat_template"]
    return {
        "convert": ["convert", "hf-to-megatron", "--load", str(model), "--save", str(tmp_path / "megatron")],
        "inspect": ["inspect", str(model)],
        "sft": ["sft", *(word for pair in sft.items() for word in pair), *chat],
        "ppo": ["ppo", *(word for pair in ppo.items() for word in pair), "--train-iters", "1", *chat],
        "parity": ["parity", "--pretrain", str(model), "--num_gpus_per_node", "2", "--tensor-model-parallel-size", "2"],
    }


ALL, TRAINING = ("convert", "inspect", "sft", "ppo", "parity"), ("sft", "ppo")
OF_PROGRAMS: list[tuple[str, str, tuple[str, ...]]] = [
    ("config.json", "half", ALL),
    ("config.json", "deep", ALL),
    ("config.json", "rms_norm_eps=1", ("convert", *TRAINING, "parity")),
    ("config.json", "hidden_size=Ellipsis", ("convert", *TRAINING, "parity")),
    ("model.safetensors.index.json", "object", ALL),
    ("model.safetensors.index.json", "weight_map={'a': 3}", ALL),
    ("model.safetensors", "text", ALL),
    ("model.safetensors", "dtype", ALL),
    ("tokenizer.json", "half", TRAINING),
    ("tokenizer_config.json", "chat_template", TRAINING),
    ("chat_template.jinja", "bytes", TRAINING),
    ("generation_config.json", "half", ("ppo",)),
]


@pytest.mark.parametrize(("file", "name", "programs"), OF_PROGRAMS)
def test_every_program(
    flags: dict[str, list[str]],
    model: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    name: str,
    programs: tuple[str, ...],
) -> None:
    (MODEL | TOKENIZER)[file][name](model / file)
    for program in programs:
        capsys.readouterr()
        try:
            status = main(flags[program])
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = capsys.readouterr().err
        assert status == 2 and file in said and "Traceback" not in said, (program, said)
        assert said.count("\n") == 1, (program, said)
