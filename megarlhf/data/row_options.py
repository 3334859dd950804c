"""What all supervised data is read, rendered and measured by."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.data.loading import DataSource, load_rows
from megarlhf.data.rows import Rows
from megarlhf.data.templates import TOOLS, Renderer, make_renderer
from megarlhf.data.token_ids import check_vocabulary
from megarlhf.data.types import TrainingRows


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Where rows come from and what becomes of them, for every kind of supervised data.

    Attributes:
        source: as for `load_rows`.
        apply_chat_template: render with the tokenizer's template; a column `tools` goes to it.
        input_template: format string with one {} for the prompt; None takes the text as it is.
        max_len: longest row in tokens, EOS included; longer ones are dropped, never cut, and counted.
        max_samples: read only the first so many rows; None reads all.
        vocab_size: tokens that the model has embeddings for.
    """

    source: str | DataSource
    tokenizer: PreTrainedTokenizerBase
    apply_chat_template: bool
    input_template: str | None
    max_len: int
    max_samples: int | None
    vocab_size: int

    @cached_property
    def renderer(self) -> Renderer:
        """What makes text of values."""
        chat, template = self.apply_chat_template, self.input_template
        return make_renderer(self.tokenizer, apply_chat_template=chat, input_template=template)

    @property
    def too_long(self) -> str:
        """The cause of rows that are dropped for their length."""
        return f"longer than max_len={self.max_len}"

    def load(self, *columns: str | None) -> Rows:
        """The rows, in which these columns are looked for; None is none."""
        given = [*columns, TOOLS if self.apply_chat_template else None]
        return load_rows(self.source, columns=[name for name in given if name is not None], limit=self.max_samples)

    def fitting(self, rows: Rows, sizes: dict[int, int]) -> list[int]:
        """Indices of the rows that `max_len` has room for, of those whose tokens are given.

        Raises:
            ValueError: there are none.
        """
        kept = [index for index, size in sizes.items() if size <= self.max_len]
        if not kept:
            raise rows.all_too_long("max_len", self.max_len, shortest=min(sizes.values()))
        return kept

    def check_tokens(self, rows: Rows, found: TrainingRows, indices: Sequence[int]) -> None:
        """Refuse tokens that the model has no embedding for, in rows that were made of those of these indices.

        Raises:
            ValueError: they are named with one row that each is in.
        """
        ends = np.cumsum(found.lengths)
        check_vocabulary(found.input_ids, ends, indices, self.tokenizer, rows=rows, vocab_size=self.vocab_size)
