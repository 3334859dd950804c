"""What lies beside a checkpoint's weights: its configuration, the tokenizer with its chat template, licences."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.formats.huggingface import CLASSIFIER, HFConfig
from megarlhf.formats.json_files import read_json_object

# Everything of a directory goes along but these: weights in any format, what is written anew, what tells of another
# training, and hidden files. Of folders only the one with a tokenizer's further chat templates.
_LEFT_OUT = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx"),
    *("*.onnx_data", "*.npz", "*.distcp", "*.index.json", "config.json", "params.json", "adapter_*", "readme*", ".*"),
    *("trainer_state.json", "conversion.json", "progress.jsonl", "*.partial"),
)
_TEMPLATES = "additional_chat_templates"
_OF_THE_WEIGHTS = ("generation_config.json", "license*", "licence*", "notice*", "copying*", "use_policy*")
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_companions(source: Path, target: Path, *, only: tuple[str, ...] = ("*",), but: tuple[str, ...] = ()) -> None:
    """Copy a checkpoint's files that belong beside its weights; patterns are of names in lower case."""

    def has(path: Path, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(path.name.lower(), pattern) for pattern in patterns)

    for path in sorted(source.iterdir()):
        if path.is_file() and has(path, only) and not has(path, (*_LEFT_OUT, *but)):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name == _TEMPLATES and "*" in only:
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)


def write_companions(target: Path, pretrain: Path, *, tokenizer: Path | None, chat_template: str | None) -> None:
    """The files that a trained model goes with: of the tokenizer and the chat template that it was trained with.

    Args:
        target: directory of the export, with its config.json unless it is an adapter.
        pretrain: directory that the weights came from.
        tokenizer: directory of the tokenizer, None for the pretrain. Of another one come all files, and its special
            tokens into the configurations; of the pretrain then its generation configuration and licence.
        chat_template: text that replaced the tokenizer's template; None where its own was used.
    """
    if tokenizer is None or tokenizer.resolve() == pretrain.resolve():
        copy_companions(pretrain, target)
    else:
        copy_companions(tokenizer, target, but=("generation_config.json",))
        copy_companions(pretrain, target, only=_OF_THE_WEIGHTS)
        _align_special_tokens(target)
    if chat_template is not None:
        _replace_chat_template(target, chat_template)
    config = target / "config.json"
    if not config.is_file():  # an adapter, which has its model's
        return
    architectures = read_json_object(config, str(target)).get("architectures") or [""]
    if architectures[0].endswith(CLASSIFIER) and any(target.glob("tokenizer*")):
        _pad_apart_from_eos(target)


def _align_special_tokens(target: Path) -> None:
    """Let the configurations name the tokenizer's special tokens, as Transformers' Trainer does before training.

    Those that the tokenizer lacks stay as they are. A response may end with any of several tokens, which add up.
    """
    tokenizer = load_tokenizer(str(target), chat_template=None)
    tokens = {name: value for name in _SPECIAL_TOKENS if (value := getattr(tokenizer, name)) is not None}
    for name in ("config.json", "generation_config.json"):
        path = target / name
        if path.is_file():
            content = read_json_object(path, f"tokenizer={target}")
            ends = content.get("eos_token_id")
            if not isinstance(ends, list):  # a single one of config.json is replaced
                ends = [ends] if name == "generation_config.json" and ends is not None else []
            content |= tokens
            if "eos_token_id" in tokens and (others := [end for end in ends if end != tokens["eos_token_id"]]):
                content["eos_token_id"] = [tokens["eos_token_id"], *others]
            write_json(path, content)


def _pad_apart_from_eos(target: Path) -> None:
    """Let a sequence classifier and its tokenizer pad with a token that is no EOS.

    Transformers takes the value of the rightmost token that is not pad_token_id, and rewards are those of EOS. Where no
    special token is left to pad with, pad_token_id is None, and sequences are judged one at a time.
    """
    config = read_json_object(target / "config.json", str(target))
    tokenizer = load_tokenizer(str(target), chat_template=None)
    ends = config.get("eos_token_id")
    taken = {None, tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    added = tokenizer.added_tokens_decoder
    taken |= {number for number in added if number >= config["vocab_size"]}
    if tokenizer.pad_token_id in taken:
        special = {number: token.content for number, token in added.items() if token.special}
        last = (tokenizer.bos_token_id,)  # Transformers gives no gradient to the embedding of what pads
        found = sorted(special.keys() - taken, key=lambda n: (n in last, "pad" not in special[n].lower(), n))
        tokenizer.pad_token = special[found[0]] if found else None
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (target / name).is_file():
                content = read_json_object(target / name, str(target))
                write_json(target / name, content | {"pad_token": tokenizer.pad_token})
    write_json(target / "config.json", config | {"pad_token_id": tokenizer.pad_token_id})


def _replace_chat_template(target: Path, text: str) -> None:
    """Make a text the only chat template there is."""
    shutil.rmtree(target / _TEMPLATES, ignore_errors=True)
    (target / "chat_template.json").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "processor_config.json"):
        if (target / name).is_file():
            content = read_json_object(target / name, f"tokenizer={target}")
            if content.pop("chat_template", None) is not None:
                write_json(target / name, content)
    (target / "chat_template.jinja").write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As Transformers writes its small files."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tied_config(source: Path, hf: HFConfig) -> dict[str, Any]:
    """config.json of a checkpoint, with what its weights say of the output layer (see read_checkpoint)."""
    config = read_json_object(source / "config.json", str(source))
    if bool(hf.tie_word_embeddings) != bool(config.get("tie_word_embeddings", type(hf)().tie_word_embeddings)):
        config["tie_word_embeddings"] = bool(hf.tie_word_embeddings)
    return config


def exported_config(source: Path, hf: HFConfig, hf_class: str, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of an exported model: the source's, but for what the written weights say.

    Args:
        source, hf: directory of the configuration, and that as read_checkpoint gives it.
        hf_class, dtype: class that reads the written weights, and their dtype.
    """
    config = tied_config(source, hf)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    if hf_class.endswith(CLASSIFIER):
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | {"architectures": [hf_class]}
