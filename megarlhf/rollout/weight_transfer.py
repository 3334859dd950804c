"""vLLM weight-transfer backend that takes a policy's weights from the trainer's ranks (rollout/weight_sources.py).

The ranks say once what lies where. For each update every worker of every engine is told the version, and reports
version and checksum of what it holds then.
"""

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from megarlhf.formats.buckets import Bucket
from megarlhf.formats.shared_memory import SharedBlock
from megarlhf.parallel.weight_group import LostMemberError, Place
from megarlhf.rollout.rounding import ROUNDS, round_linear_weights
from megarlhf.rollout.weight_sources import BucketSource, SharedMemorySource, Way, WeightSource, WeightsUpdate

logger = logging.getLogger(__name__)

BACKEND = "megarlhf"
NO_VERSION = -1  # of an engine whose update failed halfway, or whose weights are dropped


@dataclass
class SourceInit(WeightTransferInitInfo):
    """Where the weights come from: blocks of the host's memory, or buckets that come in a group."""

    blocks: list[SharedBlock] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    place: Place | None = None  # of the engine's first worker
    by_handle: bool = False  # buckets are read in the senders' memory


def register() -> None:
    """Make the backend known to this process; also the `vllm.general_plugins` entry point, so it may run twice."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SourceEngine)


class SourceEngine(WeightTransferEngine[SourceInit, WeightsUpdate]):
    """Takes all weights at each update; `version` and `checksum` tell what it holds, `applied` how that came in."""

    init_info_cls = SourceInit
    update_info_cls = WeightsUpdate
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.version, self.checksum = 0, ""
        self.applied: Way | None = None
        if isinstance(vllm_config.additional_config, dict) and (rounds := vllm_config.additional_config.get(ROUNDS)):
            round_linear_weights(model, rounds)
        self._source: WeightSource | None = None
        self._direct_allowed = (
            current_platform.is_cpu()
            and not current_platform.is_zen_cpu()  # its kernels may keep the view instead of a copy
            and vllm_config.parallel_config.tensor_parallel_size == 1
        )

    def init_transfer_engine(self, init_info: SourceInit) -> None:
        """Know from now on where weights come from."""
        source: WeightSource
        if init_info.place is None:
            source = SharedMemorySource(self, init_info.blocks, directly=self._direct_allowed)
        else:
            place = init_info.place.of_worker(self.parallel_config.rank)
            source = BucketSource(init_info.buckets, place, by_handle=init_info.by_handle)
        self.shutdown()
        self._source = source

    def start_weight_update(self) -> None:
        """Nothing to prepare: each update is complete in itself."""

    def finish_weight_update(self) -> None:
        """Nothing is pending after an update."""

    def receive_weights(self, update_info: WeightsUpdate) -> None:
        """Replace the model's weights by the trainer's; see WeightSource.

        Raises:
            RuntimeError: the engine was never told where the weights are.
        """
        if self._source is None:
            raise RuntimeError("weights cannot be updated before init_weight_transfer_engine has said where they are")
        self.checksum = self._source.update(self, update_info, begin=self.forget_version)
        self.version, self.applied = update_info.version, self._source.way

    def forget_version(self) -> None:
        """The weights are lost, or about to change."""
        self.version = NO_VERSION

    def shutdown(self) -> None:
        """Read nothing any more."""
        if self._source is not None:
            self._source.close()
        self._source = None


class WorkerExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`), for collective_rpc by name.

    What may fail gives its error back in its result, a list. vLLM 0.32 raises the first worker's at once and leaves the
    replies of the others where they are (v1/executor/multiproc_executor.py, `get_response`), so that every later call
    would get the one before's.
    """

    weight_transfer_engine: SourceEngine
    init_weight_transfer_engine: Callable[[dict[str, Any]], None]  # the worker's own, as those below
    start_weight_update: Callable[[], None]
    update_weights: Callable[[dict[str, Any]], None]
    finish_weight_update: Callable[[], None]

    def find_weights(self, source: dict[str, Any]) -> list[Exception]:
        """Know from now on where weights come from; fields of SourceInit."""
        return _errors_of(lambda: self.init_weight_transfer_engine(source))

    def take_weights(self, sent: dict[str, Any]) -> list[Exception]:
        """Update the weights; fields of WeightsUpdate."""

        def take() -> None:
            self.start_weight_update()
            self.update_weights(sent)
            self.finish_weight_update()

        return _errors_of(take)

    def weight_status(self) -> dict[str, Any]:
        """Version (or NO_VERSION) and checksum of this worker's weights and how they came."""
        engine = self.weight_transfer_engine
        return {"version": engine.version, "checksum": engine.checksum, "applied": engine.applied}

    def drop_weights(self) -> int:
        """The weights will be lost in a sleep: their version from now on."""
        self.weight_transfer_engine.forget_version()
        return NO_VERSION

    def ignore_interrupts(self) -> None:
        """Ctrl-C, which a terminal sends to every process of the program, is for the first of them."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _errors_of(work: Callable[[], None]) -> list[Exception]:
    """What it raises, in a type that any process knows; the log has where."""
    try:
        work()
    except Exception as error:
        logger.exception("weights are not there")
        known = type(error) in (ValueError, RuntimeError, LostMemberError)
        return [error if known else RuntimeError(f"{type(error).__name__}: {error}")]
    return []


register()  # a worker process imports this module for WorkerExtension, before it looks for the backend
