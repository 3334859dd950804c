"""How a program ends: what the user can mend is printed as sentences, all of it together."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megarlhf.config.checks import raise_if


class RunError(RuntimeError):
    """What stopped a run that had started, whatever kind of error a worker or a library calls it."""


@contextmanager
def running() -> Iterator[None]:
    """For a run whose settings have been checked: from here on a ValueError does not speak of the configuration."""
    try:
        yield
    except ValueError as error:
        failure = RunError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", []):
            failure.add_note(note)
        raise failure from error


@contextmanager
def machine_checks(*, dry_run: bool) -> Iterator[None]:
    """What this machine has no room for is refused, but noted in a dry run, which may rehearse for another machine."""
    try:
        yield
    except ValueError as error:
        if not dry_run:
            raise
        print(f"note: {error}", file=sys.stderr)


def report_errors(program: str, run: Callable[[], int]) -> int:
    """Run a program; what the user can mend is printed as sentences.

    Status 2 says that something given cannot be used (ValueError outside `running`), 1 that the run failed, 130 that it
    was interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run()
    except ValueError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, FloatingPointError, OSError) as error:
        said = [str(error), *getattr(error, "__notes__", [])]
        print(f"{program}: stopped: {type(error).__name__}: " + "\n".join(said), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def all_or_errors(steps: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each step returns; every step is tried, so that all mistakes are reported together.

    Raises:
        ConfigError: one line for each step that raised a ValueError of its own.
    """
    results, errors = [], []
    for step in steps:
        try:
            results.append(step())
        except ValueError as error:
            errors.append(str(error))
    raise_if(list(dict.fromkeys(errors)))
    return results
