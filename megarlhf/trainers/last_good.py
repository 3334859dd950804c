"""What a run that fails leaves behind: a checkpoint of its last finished step."""

from collections.abc import Iterator
from contextlib import contextmanager

from megarlhf.trainers.roles import RoleFailedError, Roles
from megarlhf.trainers.state import LoopState


@contextmanager
def saved_on_failure(roles: Roles, state: LoopState) -> Iterator[None]:
    """Save the last finished step when the block raises, and say so in the error; the error goes on.

    Nothing is saved where that step is on disk already, where a training role itself failed, or in the middle of a
    step's updates: then the weights are of no step.
    """
    first = state.step
    try:
        yield
    except Exception as error:
        if state.step > first and state.step != roles.checkpoint.last_saved:
            error.add_note(_save(roles, state, error))
        raise


def _save(roles: Roles, state: LoopState, error: Exception) -> str:
    """Save and say what came of it."""
    if state.updating or (isinstance(error, RoleFailedError) and error.trains):
        return f"the weights of step {state.step} are lost: the last checkpoint saved before is the last good state"
    try:
        with roles.phases.rescue():
            roles.checkpoint.save(state.step, state.to_json())
    except Exception as failure:
        return f"and step {state.step} could not be saved ({type(failure).__name__}: {failure})"
    return f"the state after step {state.step} is saved: mend the cause, and continue with load"
