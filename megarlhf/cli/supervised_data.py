"""The data of each supervised program: from its options to rows in tokens."""

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
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
from megarlhf.data.row_options import RowOptions
from megarlhf.data.sft import load_sft_rows
from megarlhf.data.supervised import SupervisedData, Units, data_lines
from megarlhf.data.tokenizer import check_same_vocabulary, load_tokenizer
from megarlhf.data.unpaired import balance_warning, load_labelled_rows
from megarlhf.formats.data_names import data_names, held_out_part, probabilities
from megarlhf.formats.huggingface import read_config

# Not in the key of kept data: a DataSource stands for these options, or no row depends on them.
_OF_SOURCE = ("dataset", "dataset_probs", "train_split", "eval_dataset", "eval_split", "data_cache_path")


def data_loaders(config: SupervisedConfig) -> list[Callable[[], Units]]:
    """What loads the training data, and, if there is any, the evaluation data."""
    training, *evaluation = _loaders(config)

    def checked() -> Units:
        if isinstance(config, KDConfig):
            check_same_vocabulary(_tokenizer(config), config.kd.teacher_model)
        return training()

    return [checked, *evaluation]


def _loaders(config: SupervisedConfig) -> list[Callable[[], Units]]:
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
    data, probs = config.data, probabilities(config.data.dataset_probs)
    part = held_out_part(data.eval_split) or 0.0
    seed = config.model.seed if part or probs else 0
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
    data, directory = config.data, config.data.data_cache_path
    options = RowOptions(
        source=source,
        tokenizer=_tokenizer(config),
        apply_chat_template=data.apply_chat_template,
        input_template=data.input_template,
        max_len=config.batch.max_len,
        max_samples=data.max_samples,
        vocab_size=read_config(config.model.pretrain).vocab_size,
    )
    if directory is None:
        found = _load_rows(config, options)
    else:
        found, place = cached(directory, _key(config, source, options), partial(_load_rows, config, options))
        print(f"tokenized data of {source} is in {place}", file=sys.stderr)
    if isinstance(config, KTOConfig) and source == data_sources(config)[0]:
        weights = config.kto.desirable_loss_weight, config.kto.undesirable_loss_weight
        if warning := balance_warning(found, desirable_weight=weights[0], undesirable_weight=weights[1]):
            print(f"warning: {warning}", file=sys.stderr)
    return found


def _tokenizer(config: SupervisedConfig) -> PreTrainedTokenizerBase:
    model = config.model
    return load_tokenizer(model.tokenizer or model.pretrain, chat_template=config.data.tokenizer_chat_template)


def _key(config: SupervisedConfig, source: DataSource, options: RowOptions) -> dict[str, Any]:
    """All that rows in tokens depend on: the files, the tokenizer's files, and options."""
    own = {name: value for name, value in asdict(config.data).items() if name not in _OF_SOURCE}
    return own | {
        "program": config.program,
        "margin_loss": isinstance(config, RMConfig) and config.rm.margin_loss,
        "source": asdict(source),
        "files": file_stamps(name.path for name in data_names(source.names)),
        "tokenizer": file_stamps([config.model.tokenizer or config.model.pretrain]),
        "tokenizer_chat_template": options.tokenizer.chat_template,
        "vocab_size": options.vocab_size,
        "max_len": options.max_len,
    }


def _load_rows(config: SupervisedConfig, options: RowOptions) -> SupervisedData:
    match config:
        case SFTConfig(data=data):
            return load_sft_rows(
                options,
                input_key=data.input_key,
                output_key=data.output_key,
                pretrain_mode=data.pretrain_mode,
                multiturn=data.multiturn,
            )
        case PRMConfig(data=data):
            return load_process_reward_rows(
                options,
                input_key=data.input_key,
                label_key=data.label_key,
                placeholder_token=data.placeholder_token,
                reward_tokens=data.reward_tokens,
            )
        case PairsConfig(data=data):
            return load_preference_rows(
                options,
                prompt_key=data.prompt_key,
                chosen_key=data.chosen_key,
                rejected_key=data.rejected_key,
                margin=isinstance(config, RMConfig) and config.rm.margin_loss,
                values=config.head == "value",
            )
        case KTOConfig(data=data):
            return load_labelled_rows(
                options, input_key=data.input_key, output_key=data.output_key, label_key=data.label_key
            )
    raise AssertionError(f"{type(config).__name__} has no data")
