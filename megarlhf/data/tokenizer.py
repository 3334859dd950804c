"""The model's tokenizer, its chat template, and the tokens at which generation stops."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from megarlhf.data.token_ids import token_text
from megarlhf.formats.json_files import broken_file, one_line, read_json_object

_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges")  # how a tokenizer's files begin


@dataclass(frozen=True, kw_only=True)
class StopToken:
    """A token that ends a response."""

    token_id: int
    text: str  # as the tokenizer spells it, in quotes
    sources: tuple[str, ...]  # what names it


def load_tokenizer(path: str, *, chat_template: str | None) -> PreTrainedTokenizerBase:
    """Tokenizer of a Hugging Face model directory; code that comes with the model is never run.

    Args:
        path: model directory, or any name that AutoTokenizer resolves.
        chat_template: what replaces the model's own template: the path of a Jinja file, the name of one of the
            tokenizer's templates where it has several, or Jinja text; None keeps the model's.
    Raises:
        ValueError: no readable tokenizer at `path`, or a template file that cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # tokenizers, the Rust library, raises a bare Exception for a broken tokenizer.json.
    except Exception as error:
        names = sorted(file.name for file in Path(path).glob("*") if file.name.startswith(_FILES))
        told = broken_file(Path(path)) or f"{one_line(error)}; its files are {', '.join(names) or 'missing'}"
        raise ValueError(
            f"tokenizer={path} cannot be loaded ({told}); it is a directory with the files of a Hugging Face "
            "tokenizer: set tokenizer, or pretrain when tokenizer is unset"
        ) from error
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise ValueError(
            f"tokenizer={path}; tokenizer_config.json has chat_template={tokenizer.chat_template!r}: it is Jinja text"
        )
    if chat_template is not None:
        own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        tokenizer.chat_template = own[chat_template] if chat_template in own else read_template(chat_template)
    return tokenizer


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, teacher_model: str) -> None:
    """A teacher's distribution is over the same tokens as the student's.

    Args:
        tokenizer: the student's.
    Raises:
        ValueError: the teacher's tokenizer has other tokens, or there is none to compare with.
    """
    try:
        theirs = load_tokenizer(teacher_model, chat_template=None).get_vocab()
    except ValueError as error:
        raise ValueError(
            f"teacher_model={teacher_model} has no tokenizer to compare with the student's: copy its files there"
        ) from error
    ours = tokenizer.get_vocab()
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differing:
        shown = ", ".join(f"{token!r} is {theirs.get(token)}, not {ours.get(token)}" for token in differing[:3])
        raise ValueError(
            f"teacher_model={teacher_model}; its tokenizer differs from {tokenizer.name_or_path} in {len(differing)} "
            f"tokens ({shown}): the KL compares probabilities of equal tokens: use a teacher with the same tokenizer"
        )


def read_template(given: str) -> str:
    """The text of a chat template that is given as a file or as itself, told apart as vLLM does.

    Raises:
        ValueError: a file that is no Jinja text, or a value without braces that is no file.
    """
    try:
        text = Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"tokenizer_chat_template={given} is not UTF-8 text ({error.reason}): give a Jinja file"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path cannot hold the character 0
        if set(given) & set("{}\n"):
            return given
        raise ValueError(
            f"tokenizer_chat_template={given} looks like a path (it has no braces) and cannot be read ({error}): give "
            "the path of a Jinja file, or its text"
        ) from error
    if Path(given).suffix.lower() == ".json":
        raise ValueError(f"tokenizer_chat_template={given} is a JSON file: give the Jinja text in it as a file")
    return text


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model_dir: str, config: PretrainedConfig) -> list[StopToken]:
    """Tokens that end a response: the tokenizer's EOS and the model's, as vLLM joins them.

    Chat models often end a turn with a token other than the tokenizer's EOS. The model names its own in
    generation_config.json; only where there is no such file config.json counts, as in Transformers.

    Args:
        model_dir: where generation_config.json may lie.
        config: the model's config.json.
    Returns:
        Ascending ids without repetition, at least one.
    Raises:
        ValueError: a generation_config.json that cannot be read, an `eos_token_id` that is not an integer or a list of
            them, a token that the model does not have, or no stop token.
    """
    path = Path(model_dir) / "generation_config.json"
    source, listed = (
        ("generation_config.json", read_json_object(path, f"pretrain={model_dir}").get("eos_token_id"))
        if path.is_file()
        else ("config.json", GenerationConfig.from_model_config(config).eos_token_id)
    )
    values = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if any(type(value) is not int for value in values):
        raise ValueError(f"{path.parent / source}: eos_token_id={listed!r} is not an integer or a list of integers")
    named: dict[int, list[str]] = {} if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id): ["tokenizer"]}
    for value in dict.fromkeys(values):
        named.setdefault(value, []).append(source)
    if not named:
        raise ValueError(
            f"tokenizer={tokenizer.name_or_path} has no EOS and {path.parent / source} names none: no response ends"
        )
    stops = [
        StopToken(token_id=token, text=token_text(tokenizer, token), sources=tuple(sources))
        for token, sources in sorted(named.items())
    ]
    unknown = [stop for stop in stops if not 0 <= stop.token_id < config.vocab_size]
    if unknown:
        listing = ", ".join(f"{stop.token_id} {stop.text} ({', '.join(stop.sources)})" for stop in unknown)
        raise ValueError(
            f"vocab_size={config.vocab_size} of pretrain leaves out the stop tokens {listing} (the model can never say "
            "them): set tokenizer to the one that the model was trained with, or correct eos_token_id"
        )
    return stops


def template_source(tokenizer_dir: str, chat_template: str | None) -> str:
    """Which file a chat template comes from, for the user; `chat_template` as for `load_tokenizer`."""
    if chat_template is not None:
        return "tokenizer_chat_template=" + (chat_template if "\n" not in chat_template else "(its text)")
    own = Path(tokenizer_dir) / "chat_template.jinja"  # Transformers reads it first
    return str(own if own.is_file() else own.with_name("tokenizer_config.json"))


def special_token_in(labels: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token of the tokenizer that is in the text of a label, None where there is none."""
    tokens = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = re.search("|".join(tokens), "\n".join(str(label) for label in labels)) if tokens else None
    return None if found is None else found[0]
