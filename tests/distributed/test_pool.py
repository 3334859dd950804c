"""What the ranks of tests do for the tests after one that goes wrong."""

import os
import socket

import pytest

from tests.distributed.pool import RankPool


def die(rank: int, world_size: int, init_method: str) -> None:
    os._exit(3 if rank == 1 else 0)


def answer(rank: int, world_size: int, init_method: str) -> int:
    return rank + 10


def port_is_held(rank: int, world_size: int, init_method: str) -> bool:
    """Before any rank has listened: nobody else can have the port."""
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", int(init_method.rpartition(":")[2])))
    return True


def test_the_port_of_a_world_is_held_from_the_start(ranks: RankPool) -> None:
    assert ranks.run(2, port_is_held) == [True, True]


def test_ranks_that_die_fail_their_own_test_alone(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 3"):
        ranks.run(2, die)
    assert ranks.run(2, answer) == [10, 11]
