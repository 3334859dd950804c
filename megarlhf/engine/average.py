"""The exponential moving average of a model's weights over its optimizer steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megarlhf.engine import checkpoint
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.optimizer import hook_gradients, main_weight


class WeightAverage:
    """average = decay * average + (1 - decay) * weights after each step, from the start's weights on.

    It is held in float32 on the host, of this rank's parameters that are trained, and takes no memory of the device.
    Under bfloat16 it is of the float32 weights that the optimizer steps: the model's own often stay as they are.

    Args:
        decay: from 0, the weights of the last step, to 1, those of the start.
    """

    def __init__(self, engine: MegatronEngine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._tensors = {name: weight.to("cpu", copy=True) for name, weight in self._weights()}

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self._engine.named_parameters() if p.requires_grad]

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._engine.finish_param_gather()
        for name, p in self._trained():
            yield name, main_weight(self._engine.optimizer, p)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of a step in; all ranks call it after the step."""
        for name, weight in self._weights():
            self._tensors[name].lerp_(weight.to("cpu"), 1.0 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the engine's parameters are the averages, on the host: to be read or loaded, not run."""
        parameters = dict(self._trained())
        own = {name: p.data for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.data = self._tensors[name]
            yield
        finally:
            for name, p in parameters.items():
                p.data = own[name]
            hook_gradients(self._engine.model)

    def save(self, directory: Path) -> None:
        """Write the averages into a checkpoint's directory; every rank calls it."""
        with self.in_place():
            checkpoint.save_weights(self._engine, directory)

    def load(self, directory: Path) -> None:
        """Take the averages of a checkpoint of any layout.

        Raises:
            ValueError: it has none, or those of another model.
        """
        if not directory.is_dir():
            raise ValueError(f"load={directory.parent}; it has no average of the weights: leave enable_ema out")
        with self.in_place():
            checkpoint.load_weights(self._engine, directory)
