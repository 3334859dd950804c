"""A checkpoint that cannot be written, on a full disk for one, does not end a run that has others to come."""

import logging
from collections.abc import Callable

from megarlhf.config.arguments import RunArguments
from megarlhf.formats.run_checkpoints import SaveFailedError

logger = logging.getLogger(__name__)


def saved(
    save: Callable[[], None], step: int, options: RunArguments, *, total_steps: int, is_last: bool, says: bool = True
) -> bool:
    """Save; where that fails before the last step, say so once on one rank, and when it is tried again.

    Raises:
        SaveFailedError: of the last step.
    """
    try:
        save()
    except SaveFailedError as error:
        if is_last:
            raise
        again = next((later for later in range(step + 1, total_steps) if options.saves(later)), total_steps)
        if says:
            logger.warning("%s; the run goes on, and saves again after step %d: free space", error, again)
        return False
    return True
