"""How new weights reach the inference engines: by where a plan has the actor's ranks and the engines."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from megarlhf.config.arguments import PPOConfig
from megarlhf.planner.memory_table import Place
from megarlhf.planner.placement import PlacementPlan

Way = Literal["shared_memory", "ipc", "broadcast"]


@dataclass(frozen=True, kw_only=True)
class Transport:
    """A way for weights, and what decided it."""

    name: Way
    why: str
    one_host: bool

    def line(self) -> str:
        """For people."""
        return f"weights to the engines: {self.name} ({self.why})"


def ways_between(senders: Set[Place], receivers: Set[Place], *, on_gpu: bool) -> list[Way]:
    """Those that are possible, the one that copies least first.

    Engines on the actor's GPUs read what its ranks gather there; those with GPUs of their own are sent the weights.
    Without GPUs engines read in the memory of the host that they share with the ranks, or are sent the weights.
    """
    one_host = len({node for node, _ in senders | receivers}) == 1
    possible: dict[Way, bool] = {
        "ipc": receivers <= senders if on_gpu else one_host,
        "broadcast": not (on_gpu and senders & receivers),
        "shared_memory": one_host,
    }
    order: tuple[Way, ...] = ("ipc", "broadcast", "shared_memory") if on_gpu else ("shared_memory", "broadcast", "ipc")
    return [way for way in order if possible[way]]


def plan_transport(config: PPOConfig, plan: PlacementPlan) -> Transport:
    """The first of the ways between a plan's actor and engines, or what weight_transport asks for.

    Raises:
        ValueError: what weight_transport asks for, or where the roles are, leaves no way.
    """
    actor, rollout = plan.of("actor"), plan.of("rollout")
    one_host, on_gpu = len({worker.node for worker in (*actor, *rollout)}) == 1, plan.device_kind == "gpu"
    senders, receivers = ({(w.node, device) for w in role for device in w.devices} for role in (actor, rollout))
    asked, possible = config.cluster.weight_transport, ways_between(senders, receivers, on_gpu=on_gpu)
    name = next(iter(possible), None) if asked == "auto" else asked
    where = f"the actor's ranks and the engines are on {'one node' if one_host else 'several nodes'}"
    if on_gpu:
        shared = "the same GPUs" if receivers <= senders else "some GPUs shared"
        where += f", with {shared if senders & receivers else 'GPUs of their own'}"
    if name is None or name not in possible:
        raise ValueError(
            f"weight_transport={asked}, and {where} (shared_memory needs one node; broadcast GPUs of their own; ipc "
            "engines on the actor's GPUs alone, or one node without GPUs): set "
            + (" or ".join(["auto", *possible]) if possible else "colocate_all_models=False, or fewer engines")
        )
    said = where if asked == "auto" else f"as weight_transport says; {where}"
    return Transport(name=name, why=said, one_host=one_host)
