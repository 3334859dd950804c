"""Tiny model directories with tokenizers, weights in shared memory, single answers, and log-probs by Transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from megarlhf.data.types import FinishReason, GeneratedGroup, TokenIds
from megarlhf.formats.shared_memory import (
    Piece,
    SharedBlock,
    bytes_of,
    checksum,
    copies_together,
    describe_block,
    digest,
)
from tests.tiny_models import VOCAB_SIZE, make_model


def make_engine_model(directory: Path, *, family: str = "llama", tied: bool = True, num_layers: int = 2) -> Path:
    """A tiny model whose tokens are the words t0, t1, ...; head_dim 32, which vLLM's CPU attention needs."""
    sizes = {"num_hidden_layers": num_layers, "num_attention_heads": 2, "num_key_value_heads": 2}
    make_model(directory, family=family, tied=tied, **sizes)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB_SIZE)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t2").save_pretrained(directory)
    return directory


def perturbed(model_dir: Path, seed: int) -> PreTrainedModel:
    """The model with every weight moved, as training would."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


class SharedModel:
    """A model's weights in this process's shared memory.

    Arranged as one trainer rank has them, what vLLM fuses in one block; `cut`: each matrix as halves of its columns
    in two blocks.
    """

    def __init__(self, model: PreTrainedModel, *, cut: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.cut = cut
        self._tensors: list[torch.Tensor] = []
        self.blocks: list[SharedBlock] = []
        for fused in _fused_weights(model):
            halves = 2 if cut and all(tensor.dim() == 2 for tensor in fused.values()) else 1
            for half in range(halves):
                parts = {name: tensor.chunk(halves, dim=-1)[half] for name, tensor in fused.items()}
                (block,) = copies_together([torch.cat(list(parts.values())).to(dtype).contiguous()], shared=True)
                self._tensors.append(block)
                self.blocks.append(describe_block(block, _pieces(fused, parts, half)))

    def checksum(self) -> str:
        """What the trainer would send."""
        return checksum(digest(bytes_of(tensor)) for tensor in self._tensors)

    def write(self, model: PreTrainedModel) -> None:
        """Another model's weights into the same memory, as training changes them."""
        for mine, other in zip(self._tensors, SharedModel(model, cut=self.cut)._tensors, strict=True):
            mine.copy_(other)


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _fused_weights(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """A checkpoint's tensors, those that vLLM fuses together and in its order."""
    with TemporaryDirectory() as scratch:  # a checkpoint has the experts one by one, and no tied head
        model.save_pretrained(scratch)
        tensors = load_file(Path(scratch) / "model.safetensors")
    groups: dict[str, list[str]] = {}
    for name in tensors:
        parts = name.split(".")
        fused = next((group for group in _FUSED if "experts" not in name and not set(group).isdisjoint(parts)), ())
        groups.setdefault(".".join(fused[0] if part in fused else part for part in parts), []).append(name)
    order = [part for group in _FUSED for part in group]

    def place(name: str) -> int:
        return next((i for i, part in enumerate(order) if part in name.split(".")), 0)

    return [{name: tensors[name] for name in sorted(names, key=place)} for names in groups.values()]


def _pieces(fused: dict[str, torch.Tensor], parts: dict[str, torch.Tensor], half: int) -> list[Piece]:
    pieces, offset = [], 0
    for name, part in parts.items():
        *rows, columns = part.shape
        index = (*(slice(0, length) for length in rows), slice(half * columns, (half + 1) * columns))
        whole, size = tuple(fused[name].shape), tuple(part.shape)
        stride = torch.empty(size).stride()
        pieces.append(Piece(name=name, shape=whole, index=index, offset=offset, size=size, stride=stride))
        offset += part.numel()
    return pieces


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sample of a group, in plain numbers."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout_log_probs: tuple[float, ...]
    text: str
    stop_text: str
    finish_reason: FinishReason
    weight_version: int


def answers(groups: Sequence[GeneratedGroup]) -> list[Answer]:
    """All samples, group by group; what a group says of itself agrees."""
    found = []
    for group in groups:
        tokens = group.tokens
        assert tokens is not None and group.lengths.tolist() == tokens.lengths.tolist()
        assert len(tokens.response_ids) == len(tokens.rollout_log_probs) == tokens.lengths.sum()
        kinds = (tokens.prompt_ids.dtype, tokens.response_ids.dtype, tokens.rollout_log_probs.dtype)
        assert kinds == (np.int32, np.int32, np.float32)
        start = 0
        columns = (group.lengths.tolist(), group.texts, group.stop_texts, group.finish_reasons)
        for length, text, stop_text, reason in zip(*columns, strict=True):
            found.append(
                Answer(
                    prompt_ids=tuple(tokens.prompt_ids.tolist()),
                    response_ids=tuple(tokens.response_ids[start : start + length].tolist()),
                    rollout_log_probs=tuple(tokens.rollout_log_probs[start : start + length].tolist()),
                    text=text,
                    stop_text=stop_text,
                    finish_reason=reason,
                    weight_version=group.weight_version,
                )
            )
            start += length
    return found


def transformers_log_probs(model: PreTrainedModel, answer: Answer, temperature: float) -> torch.Tensor:
    """[num_response_tokens] log-probs of an answer's tokens at this temperature."""
    prompt = len(answer.prompt_ids)
    tokens = torch.tensor([answer.prompt_ids + answer.response_ids])
    with torch.no_grad():
        log_probs = (model(tokens).logits[0, prompt - 1 : -1] / temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens[0, prompt:, None])[:, 0]


def make_prompts(lengths: list[int]) -> list[TokenIds]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator, dtype=torch.int32).numpy() for n in lengths]
