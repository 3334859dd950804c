"""The reference model: a second set of one model's weights, which is on the device only while it computes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Parameter

from megarlhf.formats.shared_memory import copies_together


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
