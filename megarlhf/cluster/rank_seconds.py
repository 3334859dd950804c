"""Who is slow: what each rank of a role takes for its part of a phase, and the slowest of them."""

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

logger = logging.getLogger(__name__)

PHASES = {  # of the calls that compute; engines' are noted by the piece (roles.py)
    "scores": "reward",
    "log_probs": "experience",
    "ref_log_probs": "experience",
    "values": "experience",
    "update": "train",
}
FACTOR, STEPS = 2.0, 3  # a rank that takes more than so many medians, in so many steps in a row, is told of
LEAST_SECONDS = 1.0  # of a phase of a step, to be worth it


class RankSeconds:
    """Seconds and tokens by phase and rank, of one role, until they are taken."""

    def __init__(self) -> None:
        self._spent: dict[str, dict[int, tuple[float, int]]] = {}

    def note(self, phase: str, rank: int, seconds: float, *, tokens: int = 0) -> None:
        """Add what a rank has taken.

        Args:
            tokens: that it has generated meanwhile; 0: all ranks have the same to do.
        """
        ranks = self._spent.setdefault(phase, {})
        before = ranks.get(rank, (0.0, 0))
        ranks[rank] = before[0] + seconds, before[1] + tokens

    def take(self) -> dict[str, dict[int, tuple[float, int]]]:
        """All since the last time."""
        spent, self._spent = self._spent, {}
        return spent


class TimedRole(NamedTuple):
    """What a group says of itself."""

    name: str
    nodes: Sequence[int]  # of its ranks, as the plan counts them
    seconds: RankSeconds


class SlowestRanks:
    """Metrics of each role and phase, and a warning of a rank that stays behind."""

    def __init__(self, roles: Sequence[TimedRole]) -> None:
        self._roles = list(roles)
        self._in_a_row: Counter[tuple[str, str, int]] = Counter()  # steps, by role, phase and rank

    def metrics(self) -> dict[str, float]:
        """Of the calls since the last time, a step's: see time/ROLE/PHASE/... in metrics/keys.py."""
        found, behind = dict[str, float](), dict[tuple[str, str, int], float]()
        for role in self._roles:
            for phase, ranks in role.seconds.take().items():
                paces = {rank: seconds / (tokens or 1) for rank, (seconds, tokens) in ranks.items()}
                slowest, key = max(paces, key=lambda rank: paces[rank]), f"time/{role.name}/{phase}"
                found[f"{key}/slowest_seconds"] = ranks[slowest][0]
                median = statistics.median_low(paces.values())  # of two ranks the other's
                if len(ranks) == 1 or not median:
                    continue
                found |= {f"{key}/slowest_rank": float(slowest), f"{key}/slowest_ratio": paces[slowest] / median}
                if paces[slowest] > FACTOR * median and ranks[slowest][0] >= LEAST_SECONDS:
                    behind[role.name, phase, slowest] = paces[slowest] / median
        self._in_a_row = Counter({who: self._in_a_row[who] + 1 for who in behind})
        for (name, phase, rank), ratio in behind.items():
            if self._in_a_row[name, phase, rank] == STEPS:
                node = next(role.nodes[rank] for role in self._roles if role.name == name)
                logger.warning(
                    "%s rank %d, on node %d of the plan, took %.1f times the median rank's time in phase %s, "
                    "and more than %g times in each of the last %d steps: the others wait for it",
                    *(name, rank, node, ratio, phase, FACTOR, STEPS),
                )
        return found
