"""Calls of roles at the same time, where these have devices of their own."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial

from megarlhf.trainers.roles import RoleFailedError, Roles


@contextmanager
def side_by_side(calls: Sequence[Callable[[], None]], roles: Roles) -> Iterator[Callable[[], None]]:
    """Make calls while the block runs, each of another role; what it gets waits for them, and is to be called.

    Roles that share devices make them there, one after the other. Else all have ended when the block is left, however
    it is: what one has done when another fails is then known. An interruption ends the training roles, which may
    compute for long.

    Raises:
        Exception: of the block, or of the first call that fails. The failure of a role that trains comes before others:
            its weights are lost.
    """
    if not (calls and roles.side_by_side):
        yield partial(_make, calls)
        return
    errors = list[BaseException]()
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            try:
                yield partial(_wait, futures)
            except Exception as error:
                errors.append(error)
            _wait(futures)
        except BaseException:
            for role in (roles.actor, roles.critic):
                if role is not None:
                    role.stop()
            raise
    errors += [failure for future in futures if (failure := future.exception()) is not None]
    for failure in sorted(errors, key=lambda found: not (isinstance(found, RoleFailedError) and found.trains)):
        raise failure


def _make(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _wait(futures: Sequence[Future[None]]) -> None:
    wait(futures)
