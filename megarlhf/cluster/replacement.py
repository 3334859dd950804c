"""An inference engine that is lost in the middle of a step, and another one in its place."""

import sys
import time
from collections.abc import Callable

from megarlhf.cluster.group import WorkerFailedError, WorkerGroup

_POLL_SECONDS = 2.0


class EngineReplacement:
    """Starts engines again, as often as it may, in a phase in which engines have the devices.

    Args:
        restore: gives an engine that has started the weights that the others hold.
        most: replacements in all.
    """

    def __init__(
        self, engines: WorkerGroup, restore: Callable[[int], None], *, most: int, start_timeout_seconds: float
    ) -> None:
        self._engines, self._restore, self._left = engines, restore, most
        self._start_timeout_seconds = start_timeout_seconds

    def __call__(self, engine: int, lost: WorkerFailedError) -> None:
        """Put another one in the place of an engine that died, raised or hung.

        Raises:
            WorkerFailedError: `lost`, where no replacement is left or its node has gone; or the new one does not come
                up.
        """
        if not self._left or not self._engines.can_restart(engine):
            raise lost
        self._left -= 1
        said = f"another engine is started, which answers its prompts; max_restarts leaves {self._left} more"
        print(f"{str(lost).splitlines()[0]}\n{said}", file=sys.stderr)
        self._engines.restart(engine)
        call, since, limit = self._engines.submit_to(engine, "start"), time.monotonic(), self._start_timeout_seconds
        while not self._engines.has_ended(call, within_seconds=_POLL_SECONDS) and time.monotonic() - since < limit:
            if not self._engines.can_restart(engine):  # which is known seconds after its processes died
                raise lost
        self._engines.wait_for([call], "start", ranks=[engine], timeout_seconds=limit, since=since)
        self._restore(engine)
