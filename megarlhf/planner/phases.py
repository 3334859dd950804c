"""Which parts of which role have their device's memory in each phase: the one table.

The resource manager (cluster/) acts by it, and a plan's bytes by device and phase can be counted by it. Two parts are
not in it, since their engine brings them itself: gradients are there inside an update, the reference while it computes.
"""

from dataclasses import dataclass
from typing import Literal

Part = Literal["parameters", "gradients", "optimizer", "reference"]
PARTS: tuple[Part, ...] = ("parameters", "gradients", "optimizer", "reference")

EnginePart = Literal["weights", "kv_cache"]  # of an inference engine, by vLLM's names
ENGINE_PARTS: tuple[EnginePart, ...] = ("weights", "kv_cache")


@dataclass(frozen=True, kw_only=True)
class Awake:
    """Who is awake in a phase; what is not named sleeps."""

    actor: tuple[Part, ...] = ()
    others: tuple[Part, ...] = ()  # of each other training role
    engines: tuple[EnginePart, ...] = ()
    keeps_weights: bool = True  # of engines that fall asleep for it; False: a sync must come before they answer


PHASES: dict[str, Awake] = {
    "rollout": Awake(engines=("weights", "kv_cache")),
    "train": Awake(actor=("parameters", "optimizer"), others=("parameters", "optimizer"), keeps_weights=False),
    "sync": Awake(actor=("parameters",), engines=("weights",), keeps_weights=False),
    "checkpoint": Awake(actor=("parameters", "optimizer"), others=("parameters", "optimizer")),
    "export": Awake(actor=("parameters",)),
}
