"""The prompts of a run, to train on and to evaluate with, and the tokens that end a response to them."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarlhf.cli.errors import all_or_errors
from megarlhf.config.arguments import PPOConfig, PromptColumnArguments
from megarlhf.data.loading import DataSource
from megarlhf.data.prompts import PromptData, load_prompts, prompts_in_both
from megarlhf.data.tokenizer import load_tokenizer, special_token_in, stop_tokens
from megarlhf.data.types import Prompt
from megarlhf.formats.data_names import named_sets, probabilities
from megarlhf.formats.huggingface import read_config


def load_data(config: PPOConfig) -> tuple[PromptData, dict[str, list[Prompt]], tuple[int, ...]]:
    """Training prompts, those of each evaluation set by its name, and the tokens that end a response.

    Raises:
        ConfigError: what is wrong with any of the data sets.
    """
    data, tokenizer = config.data, _tokenizer(config)
    probs = probabilities(data.prompt_data_probs)
    source = DataSource(names=data.prompt_data, probs=probs, split=data.prompt_split, seed=config.model.seed)
    train = partial(_load, config, tokenizer, source)
    (evaluation, stops), prompts = all_or_errors([partial(load_evaluation, config, tokenizer), train])
    for name, members in evaluation.items():
        if both := prompts_in_both(prompts, members):
            which = f"eval_data, {name}," if name else "eval_data"
            print(f"warning: {both} of {len(members)} prompts of {which} are trained on too", file=sys.stderr)
    return prompts, evaluation, stops


def load_evaluation(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[dict[str, list[Prompt]], tuple[int, ...]]:
    """The same without training prompts.

    Raises:
        ConfigError: what is wrong with any of the data sets.
    """
    tokenizer, given = tokenizer or _tokenizer(config), config.evaluation
    find_stops = partial(stop_tokens, tokenizer, config.model.pretrain, read_config(config.model.pretrain))
    sets = dict(named_sets(given.eval_data)) if given.eval_data else {}
    loaders = [partial(_load, config, tokenizer, DataSource(names=d, split=given.eval_split)) for d in sets.values()]
    stops, *loaded = all_or_errors([find_stops, *loaders])
    named = {name: each.prompts for name, each in zip(sets, loaded, strict=True)}
    return named, tuple(stop.token_id for stop in stops)


def _tokenizer(config: PPOConfig) -> PreTrainedTokenizerBase:
    model = config.model
    return load_tokenizer(model.tokenizer or model.pretrain, chat_template=config.data.tokenizer_chat_template)


def _load(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, source: DataSource) -> PromptData:
    data, longest = config.data, config.rollout.prompt_max_len
    # A label is optional under its default name; a rule that compares, or a name that the user chose, asks for it.
    needs_label = config.reward.reward_rule in ("math", "exact_match")
    needs_label |= data.label_key != PromptColumnArguments.label_key
    loaded = load_prompts(
        source,
        tokenizer,
        input_key=data.input_key,
        label_key=data.label_key,
        apply_chat_template=data.apply_chat_template,
        input_template=data.input_template,
        prompt_max_len=longest,
        max_samples=data.max_samples,
        vocab_size=read_config(config.model.pretrain).vocab_size,
        needs_label=needs_label,
    )
    if loaded.num_dropped:
        total = loaded.num_dropped + len(loaded.prompts)
        said = f"{loaded.num_dropped} of {total} prompts of {source} are longer than prompt_max_len={longest} tokens"
        print(f"{said} and are left out", file=sys.stderr)
    return loaded


def resolve_special_tokens(config: PPOConfig, labels: Sequence[Any]) -> PPOConfig:
    """Decide, where that was left open, whether rewards read special tokens: where a label holds one."""
    if config.reward.reward_skip_special_tokens is not None:
        return config
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.pretrain, chat_template=None)
    found = special_token_in(labels, tokenizer)
    if found is not None:
        print(
            f"labels hold special tokens, such as {found}: rewards read those of the responses too "
            "(--reward_skip_special_tokens leaves them out)",
            file=sys.stderr,
        )
    return replace(config, reward=replace(config.reward, reward_skip_special_tokens=found is None))
