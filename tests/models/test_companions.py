"""What an export carries beside its weights: all of what was trained with, and nothing that tells of something else."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.formats.huggingface import read_config
from megarlhf.models.companions import exported_config, write_companions
from tests.tiny_models import make_model

OWN = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
OTHER = "{% for m in messages %}\n  {{- m['content'] + 'é\n' }}{% endfor %}"
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ALONG = ("tokenizer.model", "qwen.tiktoken", "preprocessor_config.json", "LICENSE.txt", "tokenization_own.py")
LEFT = ("pytorch_model.bin", "model.safetensors.index.json", "README.md", ".gitattributes", "training_args.bin")


def add_tokenizer(directory: Path, *, template: str | None, **special: str) -> Path:
    """Words t0, t1, ... with these special tokens."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(50)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def pretrain(tmp_path: Path) -> Path:
    directory = make_model(tmp_path / "pretrain")  # BOS 1 and EOS 2
    add_tokenizer(directory, template=OWN, bos_token="t1", eos_token="t2")
    GenerationConfig(eos_token_id=[2, 7], temperature=0.6, do_sample=True).save_pretrained(directory)
    for name in (*ALONG, *LEFT):
        (directory / name).write_text(f"pretrain's {name}")
    (directory / "original").mkdir()
    (directory / "original" / "params.json").write_text("{}")
    return directory


@pytest.fixture
def target(tmp_path: Path, pretrain: Path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_bytes((pretrain / "config.json").read_bytes())
    return directory


def rendered(directory: Path) -> str:
    return str(AutoTokenizer.from_pretrained(directory).apply_chat_template(CHAT, tokenize=False))


def test_every_companion_of_the_pretrain_goes_along(pretrain: Path, target: Path) -> None:
    write_companions(target, pretrain, tokenizer=None, chat_template=None)
    expected = {path.name for path in pretrain.iterdir()} - {*LEFT, "model.safetensors", "original"}
    assert {path.name for path in target.iterdir()} == expected >= {*ALONG, "chat_template.jinja", "tokenizer.json"}
    for name in expected:
        assert (target / name).read_bytes() == (pretrain / name).read_bytes(), name
    assert rendered(target) == rendered(pretrain) == "<user>q<assistant>a"


def test_another_template_is_the_only_one(pretrain: Path, target: Path) -> None:
    """The places where Transformers has kept a template, over the years."""
    (pretrain / "additional_chat_templates").mkdir()
    (pretrain / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (pretrain / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    for name in ("tokenizer_config.json", "processor_config.json"):
        content = json.loads((pretrain / name).read_text()) if (pretrain / name).exists() else {"processor_class": "P"}
        (pretrain / name).write_text(json.dumps(content | {"chat_template": "older"}))
    trained = load_tokenizer(str(pretrain), chat_template=OTHER)
    write_companions(target, pretrain, tokenizer=pretrain, chat_template=str(trained.chat_template))
    assert rendered(target) == trained.apply_chat_template(CHAT, tokenize=False) == "qé\naé\n"
    assert AutoTokenizer.from_pretrained(target).chat_template == OTHER
    assert (target / "chat_template.jinja").read_text(encoding="utf-8") == OTHER
    assert not (target / "additional_chat_templates").exists() and not (target / "chat_template.json").exists()
    assert "chat_template" not in (target / "tokenizer_config.json").read_text()
    assert json.loads((target / "processor_config.json").read_text()) == {"processor_class": "P"}


def test_several_templates_of_the_tokenizer_stay(pretrain: Path, target: Path) -> None:
    (pretrain / "additional_chat_templates").mkdir()
    (pretrain / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    write_companions(target, pretrain, tokenizer=None, chat_template=None)
    assert AutoTokenizer.from_pretrained(target).chat_template == {"default": OWN, "tool_use": "tools"}


def test_another_tokenizer_comes_whole(tmp_path: Path, pretrain: Path, target: Path) -> None:
    """With its files and special tokens, and none of the pretrain's; the weights keep their licence and stop tokens."""
    other = tmp_path / "other"
    add_tokenizer(other, template=OTHER, eos_token="t5", pad_token="t9")
    for name in ("spiece.model", "LICENSE", "generation_config.json", "pytorch_model.bin", "README.md"):
        (other / name).write_text(f"other's {name}")
    write_companions(target, pretrain, tokenizer=other, chat_template=None)
    assert {path.name for path in target.iterdir()} == {
        *("config.json", "generation_config.json", "LICENSE", "LICENSE.txt", "spiece.model"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert rendered(target) == rendered(other) == "qé\naé\n"
    config, generation = AutoConfig.from_pretrained(target), GenerationConfig.from_pretrained(target)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 5, 9)  # it has no BOS of its own
    assert (generation.eos_token_id, generation.pad_token_id, generation.temperature) == ([5, 2, 7], 9, 0.6)


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_the_configuration_names_the_written_dtype(pretrain: Path, keys: tuple[str, ...]) -> None:
    path = pretrain / "config.json"
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(content | dict.fromkeys(keys, "float16")))
    written = exported_config(pretrain, read_config(pretrain), "LlamaForCausalLM", torch.bfloat16)
    assert written == content | dict.fromkeys(keys or ("dtype",), "bfloat16")
