"""A process group of its own for weights: trainer ranks and inference engines, beside the default groups of both.

Nothing of torch.distributed's or Megatron-Core's state knows of it, so that vLLM's and the trainer's are left alone.
"""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.parallel.device import current_device, device_kind, settle
from megarlhf.parallel.network import address_of

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the members of a group find each other."""

    host: str
    port: int
    key: str  # nobody else's: what is said there begins with it


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process's place in a group. An engine's is that of its first worker; the others follow it."""

    meeting: Meeting
    rank: int
    size: int
    timeout_seconds: float  # of one collective, and of meeting

    def among(self, size: int) -> "Place":
        """In a group of the first members alone."""
        return replace(self, meeting=replace(self.meeting, key=f"{self.meeting.key}/first"), size=size)

    def of_worker(self, number: int) -> "Place":
        """Of one of an engine's workers."""
        return replace(self, rank=self.rank + number)


def open_meeting(*, one_host: bool) -> tuple[dist.Store, Meeting]:
    """A store that listens as long as it is kept, and where it is: on one host not to be reached from any other.

    Between hosts it listens at the address of the interface that use_interface has set.
    """
    host = _LOOPBACK if one_host else address_of(os.environ["GLOO_SOCKET_IFNAME"])
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, Meeting(host=host, port=port, key=secrets.token_hex(16))


def store_at(meeting: Meeting, timeout: timedelta) -> dist.Store:
    """A member's end of the store.

    Raises:
        RuntimeError: it cannot be reached in time.
    """
    host, port = meeting.host, meeting.port
    tcp = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(meeting.key, tcp)


class LostMemberError(RuntimeError):
    """Another member of a group has died, or does not come."""


class Carrier(Protocol):
    """How buckets get from one member to the others."""

    place: Place
    device: torch.device  # of the buckets

    def broadcast(self, tensor: Tensor, root: int) -> Any:
        """Begin to send the root's numbers to all; `wait` ends it."""

    def wait(self, work: Any) -> None:
        """Until it is done."""

    def taken(self) -> None:
        """What came last is copied, and its memory may have the next."""

    def add_up(self, tensor: Tensor) -> None:
        """Every member's becomes the sum of all."""


class WeightGroup:
    """A member's end. Every member makes it at once, and calls the same methods in the same order.

    Any of them raises LostMemberError where a member has died, and after the timeout where one does not come, and
    leaves the group. Who stops for another reason must close it: as long as it is open, those who wait are not told.
    """

    def __init__(self, place: Place, *, on_host: bool = False) -> None:
        """Meet the others.

        Args:
            on_host: it carries what is in the host's memory, wherever the process computes.
        """
        self.place = place
        self._group: Any = None
        self._timeout = timedelta(seconds=place.timeout_seconds)
        on_gpu = device_kind() == "gpu" and not on_host
        self.device = current_device() if on_gpu else torch.device("cpu")
        with self._telling():
            store = store_at(place.meeting, self._timeout)
            self._group = (_nccl if on_gpu else _gloo)(store, place, self._timeout)
        self.add_up(torch.zeros(1, dtype=torch.int64, device=self.device))  # connections are made with the first use

    def broadcast(self, tensor: Tensor, root: int) -> dist.Work:
        """See Carrier."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        with self._telling():
            work: dist.Work = self._group.broadcast([tensor], options)
        return work

    def wait(self, work: dist.Work) -> None:
        """See Carrier."""
        with self._telling():
            work.wait(self._timeout)

    def add_up(self, tensor: Tensor) -> None:
        """See Carrier."""
        options = dist.AllreduceOptions()  # SUM
        with self._telling():
            work: dist.Work = self._group.allreduce([tensor], options)
        self.wait(work)

    def meet(self) -> None:
        """Until all are here; of a group of n in log2(n) rounds, where a sum takes 2n."""
        with self._telling():
            work: dist.Work = self._group.barrier(dist.BarrierOptions())
        self.wait(work)

    def taken(self) -> None:
        """See Carrier; what a broadcast brings is each member's own anyway."""

    def close(self) -> None:
        """Leave; whoever waits for this member is told at once."""
        if self._group is not None:
            self._group.abort()
        self._group = None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.close()
            raise LostMemberError(
                "weights do not get through: a rank of the actor or an engine has died, or did not come within "
                f"{self.place.timeout_seconds:g} s (distributed_timeout_minutes): {error}"
            ) from error


class HandleGroup:
    """Another Carrier: the senders gather each bucket on all of their devices, and receivers read it there.

    Nothing is copied through a host, and no device has two processes in one group of NCCL's.

    Args:
        senders: this process's place among them, who are the first members of `place`; None for a receiver.
    """

    def __init__(self, place: Place, *, senders: Place | None) -> None:
        self.place, self.device = place, current_device()
        self._all = WeightGroup(place, on_host=True)
        self._senders = None if senders is None else WeightGroup(senders)

    def broadcast(self, tensor: Tensor, root: int) -> dist.Work | None:
        """See Carrier; None for a receiver, whose memory is a sender's."""
        return None if self._senders is None else self._senders.broadcast(tensor, root)

    def wait(self, work: dist.Work | None) -> None:
        """Until the bucket is there; for a sender: until every receiver has taken it."""
        if self._senders is not None and work is not None:
            self._senders.wait(work)
            self._meet()
        self._meet()

    def taken(self) -> None:
        """See Carrier; a sender has waited for it."""
        if self._senders is None:
            self._meet()

    def add_up(self, tensor: Tensor) -> None:
        """See Carrier."""
        on_host = tensor.cpu()
        self._all.add_up(on_host)
        tensor.copy_(on_host)

    def close(self) -> None:
        """See WeightGroup."""
        for group in (self._all, self._senders):
            if group is not None:
                group.close()

    def _meet(self) -> None:
        """What each has begun on its device is done, and all are here."""
        settle()
        self._all.meet()


def _gloo(store: dist.Store, place: Place, timeout: timedelta) -> Any:
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo" if place.meeting.host == _LOOPBACK else "")
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    options._timeout = timeout
    options._devices = [backend.create_device(interface=interface) if interface else backend.create_default_device()]
    return backend(store, place.rank, place.size, options)


def _nccl(store: dist.Store, place: Place, timeout: timedelta) -> Any:
    backend: Any = dist.ProcessGroupNCCL
    options = backend.Options()
    options._timeout = 2 * timeout  # its watchdog, which ends the process, comes after our own waiting has given up
    return backend(store, place.rank, place.size, options)
