"""How new weights reach the inference engines: by where a plan has the actor's ranks and the engines."""

from dataclasses import dataclass
from typing import Literal

from megarlhf.config.arguments import PPOConfig
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


def plan_transport(config: PPOConfig, plan: PlacementPlan) -> Transport:
    """The way that copies least.

    Engines on the actor's GPUs read what its ranks gather there; those with GPUs of their own are sent the weights.
    Without GPUs engines read in the memory of the host that they share with the ranks, or are sent the weights.

    Raises:
        ValueError: what weight_transport asks for, or where the roles are, leaves no way.
    """
    actor, rollout = plan.of("actor"), plan.of("rollout")
    one_host, on_gpu = len({worker.node for worker in (*actor, *rollout)}) == 1, plan.device_kind == "gpu"
    senders, receivers = ({(w.node, device) for w in role for device in w.devices} for role in (actor, rollout))
    shares, all_shared = on_gpu and bool(senders & receivers), receivers <= senders if on_gpu else one_host
    possible: dict[Way, bool] = {"ipc": all_shared, "broadcast": not shares, "shared_memory": one_host}
    order: tuple[Way, ...] = ("ipc", "broadcast", "shared_memory") if on_gpu else ("shared_memory", "broadcast")
    asked = config.cluster.weight_transport
    name = next((way for way in order if possible[way]), None) if asked == "auto" else asked
    where = f"the actor's ranks and the engines are on {'one node' if one_host else 'several nodes'}"
    if on_gpu:
        where += f", with {'the same GPUs' if all_shared else 'some GPUs shared' if shares else 'GPUs of their own'}"
    if name is None or not possible[name]:
        others = [way for way in possible if possible[way]]
        raise ValueError(
            f"weight_transport={asked}, and {where} (shared_memory needs one node; broadcast GPUs of their own; ipc "
            "engines on the actor's GPUs alone, or one node without GPUs): set "
            + (" or ".join(["auto", *others]) if others else "colocate_all_models=False, or fewer engines")
        )
    said = where if asked == "auto" else f"as weight_transport says; {where}"
    return Transport(name=name, why=said, one_host=one_host)
