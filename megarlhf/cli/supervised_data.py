"""The data of each supervised program: from its options to rows in tokens."""

import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.reward_model_arguments import PRMConfig, RMConfig
from megarlhf.config.supervised_arguments import KTOConfig, PairsConfig, SFTConfig, SFTDataArguments, SupervisedConfig
from megarlhf.data.cache import cached, file_stamps
from megarlhf.data.loading import DataSource
from megarlhf.data.preferences import load_preference_rows
from megarlhf.data.process_rewards import load_process_reward_rows
from megarlhf.data.sft import load_sft_rows
from megarlhf.data.supervised import SupervisedData, Units, data_lines
from megarlhf.data.tokenizer import check_same_vocabulary, load_tokenizer
from megarlhf.data.unpaired import balance_warning, load_labelled_rows
from megarlhf.formats.data_names import data_names, held_out_part, probabilities
from megarlhf.formats.huggingface import read_config


def data_loaders(config: SupervisedConfig) -> list[Callable[[], Units]]:
    """What loads the training data, and, if there is any, the evaluation data."""
    data, batch = config.data, config.batch
    if not (isinstance(data, SFTDataArguments) and data.data_path):
        return [partial(load_data, config, source) for source in data_sources(config)]
    from megarlhf.engine.indexed_data import load_indexed  # imports megatron-core, which takes seconds

    load = partial(
        load_indexed,
        data.data_path,
        split=data.split,
        max_len=batch.max_len,
        seed=config.model.seed,
        vocab_size=read_config(config.model.pretrain).vocab_size,
    )
    validation = partial(load, part="valid", limit=data.eval_iters * batch.global_batch_size)
    return [partial(load, part="train"), *([validation] if data.evaluates else [])]


def open_data(config: SupervisedConfig, directory: Path) -> Units:
    """What a process has saved of the data that these loaders gave, for the ranks of its machine."""
    if not (isinstance(config.data, SFTDataArguments) and config.data.data_path):
        return SupervisedData.open(directory)
    from megarlhf.engine.indexed_data import IndexedUnits

    return IndexedUnits.open(directory)


def data_text(data: Units, evaluation: Units | None) -> str:
    """What a run trains and evaluates on, in lines for its start log."""
    if isinstance(data, SupervisedData):
        assert isinstance(evaluation, SupervisedData | None)
        return data_lines(data, evaluation)
    return f"training\n{data}" + ("" if evaluation is None else f"\nevaluation\n{evaluation}")


def data_sources(config: SupervisedConfig) -> list[DataSource]:
    """What is trained on, and, if there is any, what is evaluated on."""
    data, seed = config.data, config.model.seed
    part = held_out_part(data.eval_split) or 0.0
    probs = probabilities(data.dataset_probs)
    training = DataSource(names=data.dataset, probs=probs, split=data.train_split, held_out=part, seed=seed)
    if not data.evaluates:
        return [training]
    if part:
        return [training, replace(training, probs=None, is_held_out=True)]
    return [training, DataSource(names=data.eval_dataset or data.dataset, split=data.eval_split)]


def load_data(config: SupervisedConfig, source: DataSource) -> SupervisedData:
    """The rows of data sets as the program trains on them, tokenized now or by an earlier run.

    Raises:
        ValueError: rows that cannot be used.
    """
    model, directory = config.model, config.data.data_cache_path
    tokenizer = load_tokenizer(model.tokenizer or model.pretrain, chat_template=config.data.tokenizer_chat_template)
    if isinstance(config, KDConfig):
        check_same_vocabulary(tokenizer, config.kd.teacher_model)
    make = partial(_load_rows, config, source, tokenizer)
    if directory is None:
        return make()
    data, place = cached(directory, _key(config, source, tokenizer), make)
    print(f"tokenized data of {source} is in {place}", file=sys.stderr)
    return data


def _key(config: SupervisedConfig, source: DataSource, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that rows in tokens depend on: the files, the tokenizer's files, and what each program has of its own."""
    model, batch = config.model, config.batch
    shared = {group.name for group in fields(SupervisedConfig)} - {"data"}
    own = {group.name: asdict(getattr(config, group.name)) for group in fields(config) if group.name not in shared}
    del own["data"]["data_cache_path"]
    return own | {
        "program": config.program,
        "source": asdict(source),
        "files": file_stamps(name.path for name in data_names(source.names)),
        "tokenizer": file_stamps([model.tokenizer or model.pretrain]),
        "chat_template": tokenizer.chat_template,
        "vocab_size": read_config(model.pretrain).vocab_size,
        "seed": model.seed,
        "max_len": batch.max_len,
        "micro_batch_tokens": config.micro_batch_tokens,
    }


def _load_rows(config: SupervisedConfig, source: DataSource, tokenizer: PreTrainedTokenizerBase) -> SupervisedData:
    max_len, vocab_size = config.batch.max_len, read_config(config.model.pretrain).vocab_size
    match config:
        case SFTConfig(data=data):
            return load_sft_rows(
                source,
                tokenizer,
                input_key=data.input_key,
                output_key=data.output_key,
                apply_chat_template=data.apply_chat_template,
                input_template=data.input_template,
                max_len=max_len,
                pretrain_mode=data.pretrain_mode,
                multiturn=data.multiturn,
                max_samples=data.max_samples,
                vocab_size=vocab_size,
            )
        case PRMConfig(data=data):
            return load_process_reward_rows(
                source,
                tokenizer,
                input_key=data.input_key,
                label_key=data.label_key,
                placeholder_token=data.placeholder_token,
                reward_tokens=data.reward_tokens,
                apply_chat_template=data.apply_chat_template,
                input_template=data.input_template,
                max_len=max_len,
                max_samples=data.max_samples,
                vocab_size=vocab_size,
            )
        case PairsConfig(data=data):
            return load_preference_rows(
                source,
                tokenizer,
                prompt_key=data.prompt_key,
                chosen_key=data.chosen_key,
                rejected_key=data.rejected_key,
                margin=isinstance(config, RMConfig) and config.rm.margin_loss,
                input_template=data.input_template,
                apply_chat_template=data.apply_chat_template,
                max_len=max_len,
                max_samples=data.max_samples,
                vocab_size=vocab_size,
                values=config.head == "value",
            )
        case KTOConfig(data=data, kto=kto):
            found = load_labelled_rows(
                source,
                tokenizer,
                input_key=data.input_key,
                output_key=data.output_key,
                label_key=data.label_key,
                apply_chat_template=data.apply_chat_template,
                input_template=data.input_template,
                max_len=max_len,
                max_samples=data.max_samples,
                vocab_size=vocab_size,
            )
            weights = kto.desirable_loss_weight, kto.undesirable_loss_weight
            warning = balance_warning(found, desirable_weight=weights[0], undesirable_weight=weights[1])
            if warning and source == data_sources(config)[0]:
                print(f"warning: {warning}", file=sys.stderr)
            return found
    raise AssertionError(f"{type(config).__name__} has no data")
