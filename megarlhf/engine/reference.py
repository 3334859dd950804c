"""The reference model: a second set of one model's weights, which is on the device only while it computes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.nn import Parameter

from megarlhf.formats.huggingface import HFWeights, read_checkpoint
from megarlhf.formats.shared_memory import copies_together
from megarlhf.models.names import check_names
from megarlhf.models.registry import find_architecture
from megarlhf.models.weights import ModelWeights


class Reference:
    """Copies of the parameters as they are now, in one storage.

    Attributes:
        tensors: the copies, by the parameters' names.
        replaced: what the parameters are otherwise, while they point at the copies.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.replaced: dict[str, Tensor] = {}
        copies = copies_together([p.data for p in parameters.values()])
        self.tensors: dict[str, Tensor] = dict(zip(parameters, copies, strict=True))

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, Parameter]) -> Iterator[None]:
        """Inside the block the parameters point at these weights; nothing is copied."""
        self.replaced = {name: p.data for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.data = self.tensors[name]
            yield
        finally:
            for name, p in parameters.items():
                p.data = self.replaced.pop(name)


def reference_source(pretrain: str | Path, weights: ModelWeights) -> HFWeights:
    """A checkpoint that can stand in for a model's own weights.

    Raises:
        ValueError: another architecture, other tensors, or a model with buffers, which a reference does not have.
    """
    hf, source = read_checkpoint(pretrain, option="ref_pretrain")
    arch, own = weights.arch, weights.hf
    if find_architecture(hf) is not arch or hf.tie_word_embeddings != own.tie_word_embeddings:
        raise ValueError(
            f"{source.source}; it is a {find_architecture(hf).hf_class} with tie_word_embeddings="
            f"{hf.tie_word_embeddings}, and pretrain a {arch.hf_class} with {own.tie_word_embeddings} (one model "
            "computes both): use one of the same architecture"
        )
    check_names(arch, own, source, weights.head)
    if any(local.weight.buffer for local in weights.local):
        raise ValueError(f"{source.source}; {arch.hf_class} has buffers, which a reference shares: leave it out")
    return source
