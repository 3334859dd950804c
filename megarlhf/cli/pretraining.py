"""The documents of --pretrain_data: from their files to rows in tokens that all ranks map."""

import shutil
import sys
from pathlib import Path

from megarlhf.config.arguments import PPOConfig
from megarlhf.data.loading import DataSource, load_rows
from megarlhf.data.row_options import RowOptions
from megarlhf.data.sft import load_sft_rows
from megarlhf.data.supervised import SupervisedData, dropped_line
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.formats.data_names import probabilities
from megarlhf.formats.huggingface import read_config


def load_pretraining(config: PPOConfig) -> SupervisedData | None:
    """Documents as `megarlhf sft --pretrain_mode` reads them; None where there are none.

    Texts are taken as they are, whether prompts are rendered or not. Data whose first row is a list of messages is
    rendered with the chat template.

    Raises:
        ValueError: rows that cannot be used.
    """
    own, data, model = config.pretraining, config.data, config.model
    if own.pretrain_data is None:
        return None
    probs = probabilities(own.pretrain_data_probs)
    source = DataSource(names=own.pretrain_data, probs=probs, split=own.pretrain_split, seed=model.seed)
    first = load_rows(source, columns=[data.input_key], limit=1).rows[0].get(data.input_key)
    options = RowOptions(
        source=source,
        tokenizer=load_tokenizer(model.tokenizer or model.pretrain, chat_template=data.tokenizer_chat_template),
        apply_chat_template=data.apply_chat_template and not isinstance(first, str),
        input_template=None,
        max_len=config.max_row_tokens,
        max_samples=None,
        vocab_size=read_config(model.pretrain).vocab_size,
    )
    found = load_sft_rows(options, input_key=data.input_key, output_key=None, pretrain_mode=True, multiturn=False)
    tokens = int(found.rows.lengths.sum())
    print(f"{source}: {len(found)} documents, {tokens} tokens; {dropped_line(found)}", file=sys.stderr)
    return found


def write_pretraining(found: SupervisedData | None, directory: Path) -> None:
    """Put it where the ranks look for it, in the place of what a killed start has left there."""
    shutil.rmtree(directory, ignore_errors=True)
    if found is not None:
        found.save(directory)
