"""Whole runs whose actor and critic have devices of their own."""

import sys
from pathlib import Path

import pytest

from tests.cluster.runs import SMALL, Run, write_inputs
from tests.cluster.test_without_ray import untimed

PROGRAM = """
import runpy
from megarlhf.cluster import launch
planned = launch.work_side_by_side
def chosen(*given):
    print("side by side:", planned(*given))
    return planned(*given) and {chosen}
launch.work_side_by_side = chosen
runpy.run_module("megarlhf.cli.train_ppo", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow  # two runs of three processes
def test_side_by_side_is_one_after_the_other_bit_for_bit(assets: Path, tmp_path: Path) -> None:
    flags = SMALL | write_inputs(tmp_path) | {"--pretrain": str(assets / "model"), "--train-iters": "3"}
    flags |= {"--no_colocate_all_models": None, "--init_kl_coef": "0.05", "--max_epochs": "2"}
    found = {}
    for together in (True, False):
        save = tmp_path / str(together)
        given = [word for flag, value in (flags | {"--save": str(save)}).items() for word in (flag, value) if word]
        process = Run([sys.executable, "-c", PROGRAM.format(chosen=together), *given])
        process.wait(timeout=600)
        assert process.returncode == 0, process.read()
        if "side by side: True" not in process.read():
            pytest.skip("actor and critic share the only core")
        found[together] = untimed(save), (save / "hf" / "model.safetensors").read_bytes()
    assert found[True] == found[False]
    assert set(found[True][0]) == {0, 1, 2, 3} and "critic/loss" in found[True][0][3]
    assert found[True][1] != (assets / "model" / "model.safetensors").read_bytes()
