"""What a start reads off its plan."""

from typing import Any

import pytest

from megarlhf.cluster.launch import work_side_by_side
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.config.roles import ROLES
from megarlhf.planner.placement import Machine, plan_placement


@pytest.mark.parametrize(
    ("roles", "colocated", "machine", "expected"),
    [
        (["actor", "critic"], True, Machine.alike("cpu", 1, 2, 4), False),
        (["actor"], True, Machine.alike("cpu", 1, 2, 4), False),  # it sleeps while engines answer
        (["actor", "critic"], False, Machine.alike("cpu", 1, 2, 4), True),
        (["actor", "critic"], False, Machine.alike("cpu", 1, 2, 1), False),  # all share the core
        (["actor", "critic"], False, Machine.alike("cpu", 4, 2, 1), True),  # the same number on other nodes
        (["actor", "critic"], False, Machine.alike("gpu", 1, 8, 4), True),
    ],
)
def test_roles_work_side_by_side_where_no_device_has_two(
    roles: list[str], colocated: bool, machine: Machine, expected: bool
) -> None:
    given: dict[str, Any] = {"pretrain": "m", "prompt_data": "d", "save": "s", "colocate_all_models": colocated}
    given |= {"advantage_estimator": "gae", "actor_num_gpus_per_node": 2, "critic_num_gpus_per_node": 1}
    config = from_dict(PPOConfig, given)
    plan = plan_placement(config, machine)
    assert work_side_by_side(config, plan, [ROLES[role] for role in roles]) == expected
