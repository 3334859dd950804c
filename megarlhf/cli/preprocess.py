"""`megarlhf preprocess`: a .jsonl file as Megatron's indexed data set, with the flags of its preprocess_data.py.

megarlhf preprocess --input corpus.jsonl --output_prefix data/corpus --tokenizer_type HuggingFaceTokenizer \
    --tokenizer_model models/llama --append_eod --workers 16
"""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megarlhf.cli.errors import report_errors
from megarlhf.config.check_layout import broken
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import parse


@dataclass(frozen=True, kw_only=True)
class PreprocessArguments:
    """What to make tokens of."""

    input: str
    """A .jsonl file: one object a line."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of each object whose text is a document; each key has files of its own."""
    output_prefix: str
    """Path of the files to make, PREFIX_KEY_document.bin and .idx."""
    overwrite: bool = False
    """Replace files that are there."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"]
    """Megatron's name of the tokenizer's kind."""
    tokenizer_model: str
    """Directory of the Hugging Face tokenizer, or the .model file of the sentencepiece one."""
    tokenizer_hf_include_special_tokens: bool = False
    """Let the Hugging Face tokenizer put its BOS and EOS around each document."""
    append_eod: bool = False
    """End each document with the tokenizer's EOS. Without it documents run into each other."""
    workers: int | None = None
    """Processes that make tokens. None: one for each core."""
    log_interval: int = 1000
    """Documents between two lines of progress, where there is no terminal for a bar."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """A .jsonl file as Megatron's indexed data set (.bin and .idx), for `megarlhf sft --pretrain_mode --data_path`."""

    data: PreprocessArguments


def main(argv: Sequence[str] | None = None, prog: str = "megarlhf preprocess") -> int:
    """Parse and preprocess; returns the exit status."""
    config, dry_run = parse(Preprocess, sys.argv[1:] if argv is None else argv, prog=prog)
    return report_errors(prog, lambda: _run(config.data, dry_run=dry_run))


def _run(options: PreprocessArguments, *, dry_run: bool) -> int:
    prefixes = {key: f"{options.output_prefix}_{key}_document" for key in options.json_keys}
    raise_if(_errors(options, prefixes.values()))
    from megarlhf.data.corpus import Encoder, corpus_tokenizer, encode_file

    load = partial(
        corpus_tokenizer,
        options.tokenizer_type,
        options.tokenizer_model,
        special_tokens=options.tokenizer_hf_include_special_tokens,
    )
    tokenizer = load()
    if options.append_eod and tokenizer.eod is None:
        raise ValueError(f"append_eod=True and tokenizer_model={options.tokenizer_model} has no EOS: use another")
    print(f"tokenizer: {options.tokenizer_model}, {tokenizer.vocab_size} tokens; end of document: {tokenizer.eod}")
    if dry_run:
        print("\n".join(f"{prefix}.bin and .idx would be made" for prefix in prefixes.values()))
        return 0
    from megarlhf.engine.indexed_data import CorpusWriter

    eod = tokenizer.eod if options.append_eod else None
    encoder = Encoder(path=options.input, keys=options.json_keys, load=load, eod=eod)
    Path(options.output_prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writers = {}
        for key, prefix in prefixes.items():
            writers[key] = CorpusWriter(prefix, vocab_size=tokenizer.vocab_size)
            stack.callback(writers[key].abandon)  # removes nothing of what was closed
        bar = stack.enter_context(_Bar(os.path.getsize(options.input), options.log_interval))
        for documents in encode_file(encoder, workers=options.workers or os.cpu_count() or 1):
            for key, writer in writers.items():
                writer.add_documents(documents.ids[key], documents.lengths[key])
            bar.count(len(documents.lengths[options.json_keys[0]]), documents.num_bytes)
        if not bar.num_documents:
            raise ValueError(f"input={options.input} has no rows: nothing to write")
        for writer in writers.values():
            writer.close()
    for key, writer in writers.items():
        print(f"{prefixes[key]}: {writer.num_documents} documents, {writer.num_tokens} tokens")
    return 0


def _errors(options: PreprocessArguments, prefixes: Iterable[str]) -> list[str]:
    there = [path for prefix in prefixes for path in (f"{prefix}.bin", f"{prefix}.idx") if os.path.exists(path)]
    hugging_face = options.tokenizer_type == "HuggingFaceTokenizer"
    is_there = os.path.isdir if hugging_face else os.path.isfile
    return broken(
        {
            f"input={options.input} is not a file: give a .jsonl file": not os.path.isfile(options.input),
            f"output_prefix={options.output_prefix} has {', '.join(there)} already: use another, or overwrite": (
                there and not options.overwrite
            ),
            f"tokenizer_model={options.tokenizer_model} is not a local {'directory' if hugging_face else 'file'}, as "
            f"tokenizer_type={options.tokenizer_type} takes it: correct either": not is_there(options.tokenizer_model),
            "tokenizer_hf_include_special_tokens=True is ignored with tokenizer_type=SentencePieceTokenizer: leave it "
            "out": options.tokenizer_hf_include_special_tokens and not hugging_face,
            f"workers={options.workers} must be at least 1": options.workers is not None and options.workers < 1,
            f"log_interval={options.log_interval} must be at least 1": options.log_interval < 1,
            "json_keys is empty: name the key of the text": not options.json_keys,
        }
    )


class _Bar(Progress):
    """Bytes done of a file, on stderr: a bar on a terminal, else a line after so many documents."""

    def __init__(self, total: int, log_interval: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        super().__init__(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self.add_task("tokens", total=total)
        self._interval, self._start, self._bytes = log_interval, time.monotonic(), 0
        self.num_documents = 0

    def count(self, num_documents: int, num_bytes: int) -> None:
        """Count documents that are done."""
        before = self.num_documents // self._interval
        self.num_documents += num_documents
        self._bytes += num_bytes
        self.update(self._task, advance=num_bytes)
        if self.disable and self.num_documents // self._interval > before:
            seconds = time.monotonic() - self._start
            speed = f"{self.num_documents / seconds:.0f} documents/s, {self._bytes / seconds / 1e6:.1f} MB/s"
            print(f"{self.num_documents} documents ({speed})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
