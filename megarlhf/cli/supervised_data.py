"""The data of each supervised program: from its options to rows in tokens."""

from megarlhf.config.supervised_arguments import SFTConfig, SupervisedConfig
from megarlhf.data.sft import load_sft_rows
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.formats.huggingface import read_config


def load_data(config: SupervisedConfig, path: str) -> SupervisedData:
    """The rows of a data file as the program trains on them.

    Raises:
        ValueError: rows that cannot be used.
    """
    model = config.model
    tokenizer = load_tokenizer(model.tokenizer or model.pretrain, chat_template=config.data.tokenizer_chat_template)
    max_len, vocab_size = config.batch.max_len, read_config(model.pretrain).vocab_size
    match config:
        case SFTConfig(data=data):
            return load_sft_rows(
                path,
                tokenizer,
                input_key=data.input_key,
                output_key=data.output_key,
                apply_chat_template=data.apply_chat_template,
                input_template=data.input_template,
                max_len=max_len,
                pretrain_mode=data.pretrain_mode,
                max_samples=data.max_samples,
                vocab_size=vocab_size,
            )
    raise AssertionError(f"{type(config).__name__} has no data")
