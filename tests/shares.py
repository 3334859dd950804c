"""Slow tests dealt into shares, of which a run of CI takes one: `--slow-share K/N`."""

import argparse
from collections.abc import Sequence
from itertools import groupby

import pytest


def share(node_ids: Sequence[str], number: int, count: int) -> set[str]:
    """Those of `node_ids` that belong to a share, counted from 0 and round again after `count`.

    Each file's tests are dealt out in turn, since those of one file take about equally long. Every second file deals
    from the other end, so that the single tests of small files do not all fall to the first share.
    """
    found: set[str] = set()
    for place, (_, group) in enumerate(groupby(sorted(node_ids), key=lambda node_id: node_id.split("::")[0])):
        found.update(node_id for turn, node_id in enumerate(group) if (turn + place) % count == number % count)
    return found


def _numbers(given: str) -> tuple[int, int]:
    number, _, count = given.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(count) > 0):
        raise argparse.ArgumentTypeError(f"{given}; it has the form K/N, such as 1/2")
    return int(number), int(count)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-share",
        metavar="K/N",
        type=_numbers,
        help="of the slow tests keep the K-th of N shares; K counts from 0 and may go on past N, as commits do",
    )


@pytest.hookimpl(tryfirst=True)  # before -m and -k: a test's share does not depend on what else is selected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    given = config.getoption("--slow-share")
    if given is None:
        return
    slow = [item.nodeid for item in items if item.get_closest_marker("slow")]
    others = set(slow) - share(slow, *given)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in others])
    items[:] = [item for item in items if item.nodeid not in others]
