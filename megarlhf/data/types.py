"""The records that cross between phases: prompts, samples, experience and packed micro-batches.

Sequences are ragged: one list or tensor per sample, never padded. A mask is named for what True selects.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the prompt data, tokenized."""

    index: int  # row in the data file, stable across runs
    text: str  # rendered prompt, as the model reads it
    token_ids: tuple[int, ...]  # tokens of `text`
    label: Any  # reference answer for the reward, any JSON value; None where the data has none


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One generated response, with what its scoring and training need."""

    prompt: Prompt
    group_id: int  # place of the prompt in its rollout batch; equal for the samples of one prompt
    sample_id: int  # 0 .. n_samples_per_prompt - 1 inside the group
    response_ids: tuple[int, ...]  # generated tokens, the stop token included
    rollout_log_probs: tuple[float, ...]  # log p of each response token as the inference engine computed it
    response_text: str  # decoded response; special tokens are in it with reward_skip_special_tokens=False
    finish_reason: FinishReason  # "stop": a stop token came; "length": cut at the limit
    weight_version: int  # policy version that generated it
    reward: float | None = None  # outcome reward; None: no result (never a silent 0)
    stop_text: str = ""  # the stop token at the end of response_text, where special tokens are in it


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One sequence for the engine. Fields are aligned with its targets, the tokens from `prompt_length` on."""

    input_ids: tuple[int, ...]  # prompt and response tokens
    prompt_length: int  # tokens before the first target, at least 1
    group_id: int  # rows with one group_id begin with the same prompt and may share its computation
    fields: dict[str, Tensor] = field(default_factory=dict)  # name -> [num_targets] float32, such as advantages

    @property
    def num_targets(self) -> int:
        """Tokens that the loss looks at."""
        return len(self.input_ids) - self.prompt_length


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows packed into one line of tokens.

    A segment is a run of tokens that attends causally to itself and, where it shares a prompt, to all of that
    prompt's segment as well. Under context parallelism the tensors are one rank's part of the line
    (parallel/context.py), while cu_seqlens, prefix_segments and rows speak of the whole line.
    """

    tokens: Tensor  # [t] int64, inputs
    targets: Tensor  # [t] int64, the token each position predicts
    position_ids: Tensor  # [t] int64, place inside the sequence; continues after a shared prompt
    cu_seqlens: Tensor  # [num_segments + 1] int32, segment boundaries
    prefix_segments: tuple[int | None, ...]  # per segment: the segment it continues, None where it starts afresh
    target_mask: Tensor  # [t] bool, True where `targets` belongs to a row's response
    fields: dict[str, Tensor]  # name -> [t] float32, zero outside target_mask
    rows: tuple[tuple[int, int, int], ...]  # (row index in the caller's list, start, stop) of its targets in the line
    context_size: int = 1  # ranks that share the line
