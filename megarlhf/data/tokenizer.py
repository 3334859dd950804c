"""The model's tokenizer, and the tokens at which generation stops."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(path: str, *, chat_template: str | None) -> PreTrainedTokenizerBase:
    """Tokenizer of a Hugging Face model directory; code that comes with the model is never run.

    Args:
        path: model directory, or any name that AutoTokenizer resolves.
        chat_template: Jinja text that replaces the model's own template; None keeps the model's.
    Raises:
        ValueError: no readable tokenizer at `path`, or a template with a syntax error.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # tokenizers, the Rust library, raises a bare Exception for a broken tokenizer.json.
    except Exception as error:
        raise ValueError(
            f"tokenizer={path} cannot be loaded ({type(error).__name__}: {error}); it is a directory with the files of "
            "a Hugging Face tokenizer: set tokenizer, or pretrain when tokenizer is unset"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "probe"}], tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"tokenizer_chat_template is not valid Jinja: {error}") from error
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_dir: str) -> list[int]:
    """Tokens that end a response: the tokenizer's EOS and those of the model's generation_config.json.

    Chat models often end a turn with a token other than the tokenizer's EOS and name it only in that file.

    Returns:
        Ascending token ids without repetition, at least one.
    Raises:
        ValueError: no model directory, an `eos_token_id` that is not an integer or a list of them, or no stop token.
    """
    if not Path(model_dir).is_dir():
        raise ValueError(
            f"pretrain={model_dir} is not a directory: stop tokens are read from its generation_config.json"
        )
    stops = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    path = Path(model_dir) / "generation_config.json"
    if path.is_file():
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        values = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if any(type(value) is not int for value in values):
            raise ValueError(f"{path}: eos_token_id={listed!r} is not an integer or a list of integers")
        stops.update(values)
    if not stops:
        raise ValueError(f"tokenizer={tokenizer.name_or_path} has no EOS and {path} names none: no response would end")
    return sorted(stops)


def special_token_in(labels: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token of the tokenizer that is in the text of a label, None where there is none."""
    tokens = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = re.search("|".join(tokens), "\n".join(str(label) for label in labels)) if tokens else None
    return None if found is None else found[0]
