"""What the programs share: signals, the models' files, the run directory."""

import math
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megarlhf.config.arguments import LoggingArguments
from megarlhf.config.layouts import LayoutArguments
from megarlhf.engine import checkpoint_files
from megarlhf.parallel.device import device_kind

if TYPE_CHECKING:
    from megarlhf.models.hf_files import HFWeights


class StopSignal:
    """Turns true when SIGTERM or SIGUSR1 arrives: finish the step, save, exit."""

    def __init__(self) -> None:
        self.received = False
        self.listen()

    def listen(self) -> None:
        """Take both signals, also back from a library that has taken them since."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        print(f"\n{signal.Signals(number).name}: finishing the step, then saving and leaving", file=sys.stderr)

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.received


def check_weights(*models: tuple[str, LayoutArguments]) -> list["HFWeights"]:
    """Open each model, headers alone.

    Args:
        models: directory and the layout that it is to have.
    Returns:
        The opened models, in order.
    Raises:
        ValueError: an architecture that cannot be trained on this device, or weight files that are not whole.
    """
    from megarlhf.models.hf_files import HFWeights, read_config
    from megarlhf.models.registry import check_transformer_engine, find_architecture

    opened = []
    for pretrain, layout in models:
        config = read_config(pretrain)
        arch = find_architecture(config)
        if device_kind() == "gpu":
            check_transformer_engine(
                arch,
                config,
                context_parallel_size=layout.context_parallel_size,
                cp_comm_type=layout.cp_comm_type,
            )
        opened.append(HFWeights(pretrain))
    return opened


def check_shared_memory(weights: "HFWeights", *, bf16: bool) -> None:
    """There must be room for the model's weights; layouts with replicas may take more.

    Raises:
        ValueError: the weights alone do not fit.
    """
    from megarlhf.data import shared_tensors
    from megarlhf.models.hf_files import read_config

    tied = bool(read_config(weights.directory).tie_word_embeddings)
    names = [name for name in weights.names() if not (tied and name == "lm_head.weight")]
    num_bytes = sum(math.prod(weights.shape(name)) for name in names) * (2 if bf16 else 4)
    shared_tensors.check_shared_memory(num_bytes, shared_tensors.free_shared_memory())


def open_run_directory(save: str, config_yaml: str) -> Path:
    """Make the run directory and write the resolved configuration into it."""
    directory = Path(save)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(config_yaml)
    return directory


def resumed_step(logging: LoggingArguments, identity: dict[str, Any]) -> int | None:
    """Step of the checkpoint that --load names; None for a fresh run.

    Raises:
        ValueError: there is no complete checkpoint, or it is of another model.
    """
    if logging.load is None:
        return None
    step, directory, state = checkpoint_files.latest(Path(logging.load) / "checkpoints")
    saved = state.get("identity", {})
    checkpoint_files.check_identity(saved, identity, directory, with_optimizer=not logging.no_load_optim)
    return step


def model_identity(pretrain: str, *layouts: LayoutArguments) -> dict[str, Any]:
    """What a checkpoint and a configuration must agree on: the model's shape, and how optimizer state is kept.

    Args:
        layouts: of each model that is trained.
    """
    from megarlhf.models.hf_files import read_config

    config = read_config(pretrain)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    return {
        "architecture": (config.architectures or ["none"])[0],
        checkpoint_files.OPTIMIZER_STATE: {
            "use_distributed_optimizer": layouts[0].use_distributed_optimizer,
            "expert_model_parallel_size above 1": [layout.expert_model_parallel_size > 1 for layout in layouts],
        },
        **{name: getattr(config, name) for name in names},
    }
