"""Which Hugging Face tensors a model has, compared with those that a checkpoint stores; from headers alone."""

import math
import re
from collections import Counter
from collections.abc import Mapping

import torch

from megarlhf.formats.huggingface import EMBEDDING, LM_HEAD, HFConfig, HFWeights, has_score_head, shortened
from megarlhf.models.arch import ArchSpec, WeightMap

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_VOCAB_MULTIPLE = 128  # Megatron's --make-vocab-size-divisible-by; fixed, so that checkpoints fit every TP size
# Buffers that older versions of Transformers and ColossalAI stored; nothing reads them.
_UNUSED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding after padding, so that every rank holds as many."""
    multiple = math.lcm(_VOCAB_MULTIPLE, tp_size)
    return math.ceil(vocab_size / multiple) * multiple


def is_tied(hf: HFConfig, head: str) -> bool:
    """Whether the output layer is the embedding; `hf` as read_checkpoint gives it."""
    return bool(hf.tie_word_embeddings) and head == "lm"


def model_maps(arch: ArchSpec, hf: HFConfig, head: str) -> list[WeightMap]:
    """The table's entries of a model, in HF order."""
    return list(arch.weight_maps(hf, tied=is_tied(hf, head), head=head))


def model_shapes(arch: ArchSpec, hf: HFConfig, head: str) -> dict[str, tuple[int, ...]]:
    """Shape of every HF tensor of a model, from the configuration."""
    sizes = arch.dimensions(hf)
    return {
        name: tuple(sizes[dimension] for dimension in shape)
        for weight in model_maps(arch, hf, head)
        for name, shape in zip(weight.hf, weight.shapes, strict=True)
    }


def check_reward_model(hf: HFConfig, source: HFWeights) -> None:
    """For a model whose scores are rewards: it has one linear head, named as Transformers' classifiers name it.

    Raises:
        ValueError: another kind of model, several labels, or a head of another name or shape.
    """
    if not has_score_head(hf):
        raise ValueError(
            f"{source.source}; architectures={hf.architectures} is no reward model: use a ...ForSequenceClassification "
            "with one label, such as megarlhf rm exports"
        )
    if hf.num_labels != 1:
        raise ValueError(
            f"{source.source}; config.json has num_labels={hf.num_labels} (its default is 2), and a reward is one "
            'number: use a model with one, or set "num_labels": 1 where score.weight has one row'
        )
    heads = [name for name in source.names() if not name.startswith("model.") and name != LM_HEAD]
    if heads != ["score.weight"]:
        raise ValueError(
            f"{source.source}; its head is {shortened(heads)}, and a reward is read by score.weight alone, as "
            "Transformers names it: rename the tensor, or use another model"
        )


def check_names(arch: ArchSpec, hf: HFConfig, source: HFWeights, head: str) -> None:
    """Compare a checkpoint's tensors with the table.

    A value head may be missing from a causal language model: it is drawn then.

    Raises:
        ValueError: missing, unknown or wrongly shaped tensors, the first of each kind named.
    """
    shapes, present = model_shapes(arch, hf, head), set(source.names())
    drawn = head == "value" and not has_score_head(hf)
    missing = sorted(shapes.keys() - present - ({"score.weight"} if drawn else set()))
    spare = {"score.weight"} if head == "lm" else {LM_HEAD}
    spare |= {LM_HEAD} if is_tied(hf, head) else set()
    unknown = sorted(name for name in present - shapes.keys() - spare if not _UNUSED.search(name))
    problems = [f"missing {shortened(missing)}"] if missing else []
    if LM_HEAD in missing:
        problems.append("tie_word_embeddings=False, so the output layer is not the embedding")
    problems += [f"unknown {shortened(unknown)}"] if unknown else []
    wrong = [name for name in shapes if name in present and source.shape(name) != shapes[name]]
    problems += [f"{name} has shape {source.shape(name)}, config.json says {shapes[name]}" for name in wrong[:8]]
    problems += [f"{len(wrong) - 8} more have other shapes"] if len(wrong) > 8 else []
    if problems:
        raise ValueError(f"{source.source}; weights do not fit config.json ({arch.hf_class}): " + "; ".join(problems))


def stored_dtypes(arch: ArchSpec, hf: HFConfig, source: HFWeights, head: str) -> dict[str, torch.dtype]:
    """The dtype of every HF tensor of a model as the checkpoint stores it; exports keep it.

    A drawn value head has the embedding's.

    Raises:
        ValueError: a dtype that weights are not trained from.
    """
    present = set(source.names())
    found = {name: source.dtype(name if name in present else EMBEDDING) for name in model_shapes(arch, hf, head)}
    wrong = sorted(name for name, dtype in found.items() if dtype not in _DTYPES)
    if wrong:
        kinds = sorted({found[name] for name in wrong})
        raise ValueError(f"{source.source}; dtype {', '.join(kinds)} of {shortened(wrong)}: one of {sorted(_DTYPES)}")
    return {name: _DTYPES[dtype] for name, dtype in found.items()}


def main_dtype(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of most numbers of a model: what config.json calls the model's."""
    counts: Counter[torch.dtype] = Counter()
    for name, shape in shapes.items():
        counts[dtypes[name]] += math.prod(shape)
    return counts.most_common(1)[0][0]
