"""Faults of every role in every phase: a run ends as an undisturbed one, or with a checkpoint and a sentence.

Twenty draws of one seed, three to a run; `make test-slow` makes all of them, and CI one run, by the commit's number.
Whole runs, whose processes take seconds to start each time, so slow.
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megarlhf.formats import run_checkpoints
from tests.cluster.faulty_run import PHASES, ROLES, Fault
from tests.cluster.runs import SMALL, Run, metrics, run, write_inputs
from tests.cluster.test_reward_runs import reward_model

pytestmark = pytest.mark.slow
STEPS, HANG_SECONDS = 6, 30.0
STEPS_OF = {"save": (2, 4, 6), "eval": (3, 6)}  # by --save-interval and --eval-interval
Flags = dict[str, str | None]


def draws(random: Random, count: int) -> list[Fault]:
    """Of all pairs of a role and a phase as many, none twice, with a step and a moment each."""
    found = []
    for role, phase in random.sample([(role, phase) for role in ROLES for phase in PHASES], count):
        step, rank = random.choice(STEPS_OF.get(phase, range(1, STEPS + 1))), 0
        if role == "actor":
            rank = random.randrange(2)
        after = random.choice((0.0, 0.02, 0.1))
        if (phase, step) == ("eval", STEPS):
            after = 0.0  # else its answer may have come, and nothing is asked of it any more
        found.append(Fault(role=role, rank=rank, phase=phase, step=step, after_seconds=after))
    return found


def in_order(faults: Sequence[Fault]) -> list[Fault]:
    """As a run comes to them."""
    return sorted(faults, key=lambda fault: (fault.step, PHASES.index(fault.phase)))


def place(fault: Fault) -> str:
    """For the test's name."""
    return f"{fault.process} {fault.phase}"


# Of a seed that has the calls which each role answers itself: in training, generation, scoring, sync and saving.
KILLS = draws(Random(3982), 20)
RUNS = [in_order(KILLS[first : first + 3]) for first in range(0, 20, 3)]
ENDING = (2, 5, 6)  # runs whose last loss is one too many
OTHERWISE: dict[int, Flags] = {
    3: {"--no_colocate_all_models": None},
    4: {"--weight_transport": "broadcast", "--update_weight_buffer_mib": "1"},
}
IN_RAY = 1
HANGS = [
    [
        Fault(role="reward", phase="reward", step=1, how="SIGSTOP"),
        Fault(role="actor", rank=1, phase="train", step=4, how="SIGSTOP"),
    ],
    [
        Fault(role="function", phase="rollout", step=1, how="SIGSTOP"),
        Fault(role="rollout", phase="rollout", step=2, how="SIGSTOP"),
        Fault(role="critic", phase="save", step=4, how="SIGSTOP"),
    ],
]


def becomes(faults: Sequence[Fault], max_restarts: int) -> list[str]:
    """What each of them leads to; "end": the run ends, and the others do not come about."""
    found, restarts, replacements = list[str](), max_restarts, max_restarts
    for fault in faults:
        if fault.role == "function":
            found.append("nothing")
        elif fault.role == "rollout" and fault.phase in ("rollout", "eval") and replacements:
            replacements -= 1
            found.append("replacement")
        elif restarts:
            restarts, replacements = restarts - 1, max_restarts
            found.append("restart")
        else:
            return [*found, "end"]
    return found


@pytest.fixture(scope="module")
def flags(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Flags:
    """PPO with every role: two ranks of the actor, one of the critic and of a reward model, an engine, a function."""
    directory = tmp_path_factory.mktemp("inputs")
    model = reward_model(assets, directory / "reward_model", seed=5, mean=0.25, std=0.5)
    own = {
        **{"--pretrain": str(assets / "model"), "--reward_pretrain": str(model), "--train-iters": str(STEPS)},
        **{"--actor_num_gpus_per_node": "2", "--critic_num_gpus_per_node": "1", "--reward_num_gpus_per_node": "1"},
        **{"--save-interval": "2", "--eval-interval": "3", "--best_metric": "eval/reward_mean"},
        **{"--phase_timeout_seconds": f"{HANG_SECONDS:g}", "--reward_timeout_seconds": "5"},
        **{"--save_value_network": None, "--max_ckpt_num": str(STEPS)},
    }
    return SMALL | write_inputs(directory) | own


@pytest.fixture(scope="module")
def undisturbed(flags: Flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle, with a checkpoint of each step."""
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    run("train_ppo", flags | {"--save": str(save), "--save-interval": "1"})
    return save


def run_with(faults: Sequence[Fault], flags: Flags, *, program: str = "train_ppo") -> tuple[int, str, float]:
    """A run's exit status, its output, and the seconds from its last fault to its end; no process of it is left."""
    given = json.dumps([asdict(fault) for fault in faults])
    words = [word for flag, value in flags.items() for word in ([flag] if value is None else [flag, value])]
    before = {process.pid for process in psutil.process_iter()}
    process = Run([sys.executable, "-m", "tests.cluster.faulty_run", given, program, *words])
    process.wait(timeout=600)
    ended, output = time.time(), process.read()
    times = re.findall(r"^\S.* of \S+ in \w+ of step \d, at (\d+\.\d+)$", output, re.MULTILINE)
    assert len(times) == len(faults), output
    others = [other for other in psutil.process_iter() if other.pid not in before]
    assert not (left := [other for other in others if str(flags["--save"]) in _said(other)]), left
    return process.returncode, output, ended - float(times[-1])


def _said(process: psutil.Process) -> str:
    try:
        return " ".join([*process.cmdline(), *(file.path for file in process.open_files())])
    except psutil.Error:  # it has ended
        return ""


def check_same(save: Path, undisturbed: Path) -> None:
    """All that is exported, and every metric that does not depend on the clock."""
    for name in ("hf", "hf_best", "hf_critic"):
        first, second = (load_file(directory / name / "model.safetensors") for directory in (undisturbed, save))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    expected, found = metrics(undisturbed), metrics(save)
    assert list(found) == list(expected) == list(range(STEPS + 1))
    for step, row in found.items():
        assert untimed(row) == untimed(expected[step]), f"step {step}"


def untimed(row: dict[str, float]) -> dict[str, float]:
    """Without what is of the clock, and of the first step of a start."""
    return {key: value for key, value in row.items() if not key.startswith(("time/", "perf/", "memory/"))}


def state_of(checkpoint: Path, role: str, directory: Path) -> dict[str, Any]:
    """Weights, running means and step counts in a checkpoint."""
    dcp_to_torch_save(checkpoint / role, directory / "state.pt")
    found: dict[str, Any] = torch.load(directory / "state.pt", weights_only=False)
    return found


def check_checkpoint(save: Path, undisturbed: Path, directory: Path) -> int:
    """The last one is complete, and the undisturbed run's of the same step; returns the step."""
    step, found, state = run_checkpoints.latest(save / "checkpoints")
    expected = run_checkpoints.iteration_directory(undisturbed / "checkpoints", step)
    for role in ("actor", "critic"):
        ours, theirs = state_of(found, role, directory), state_of(expected, role, directory)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, theirs[key]), f"{role} {key}"
    assert not list((save / "checkpoints").glob("*.partial"))
    other = json.loads((expected / "run_state.json").read_text())
    assert state | {"unlogged": None} == other | {"best": state["best"]}
    return step


@pytest.mark.parametrize("number", range(len(RUNS)), ids=lambda number: "; ".join(map(place, RUNS[number])))
def test_losses_cost_a_run_nothing_but_time_or_end_it_with_a_checkpoint(
    number: int, flags: Flags, undisturbed: Path, tmp_path: Path
) -> None:
    faults, save = RUNS[number], tmp_path / "run"
    enough = next(most for most in range(9) if "end" not in becomes(faults, most))
    most = enough - 1 if number in ENDING else enough + 1
    fates = becomes(faults, most)
    assert len(fates) == len(faults) and (fates[-1] == "end") == (number in ENDING)
    own = OTHERWISE.get(number, {}) | {"--max_restarts": str(most), "--save": str(save)}
    program = "train_ppo_ray" if number == IN_RAY else "train_ppo"
    status, output, seconds = run_with(faults, flags | own, program=program)
    for fault, fate in zip(faults, fates, strict=True):
        if fate != "nothing":
            assert f"{fault.role} rank {fault.rank} died during " in output, output
    assert output.count("another engine is started") == fates.count("replacement"), output
    assert output.count("starting again after step") == fates.count("restart"), output
    if number not in ENDING:
        assert status == 0, output
        check_same(save, undisturbed)
        return
    assert status == 1 and seconds < 60, output
    step = check_checkpoint(save, undisturbed, tmp_path)
    sentence = output[output.index("stopped: WorkerFailedError: ") :]
    assert f"{faults[-1].role} rank {faults[-1].rank} died during " in sentence.splitlines()[0]
    if faults[-1].role in ("reward", "rollout"):
        assert step >= max(metrics(save)), "nothing is lost"
    else:
        assert step in (2, 3, 4) and "are lost: the last checkpoint saved before is the last good state" in sentence


@pytest.mark.parametrize("faults", HANGS, ids=lambda faults: "; ".join(map(place, faults)))
def test_hung_processes_are_noticed_at_the_limit_of_a_phase_and_replaced(
    faults: list[Fault], flags: Flags, undisturbed: Path, tmp_path: Path
) -> None:
    """In Ray too, where an engine that hangs answers no request to end."""
    in_ray, save = faults is HANGS[1], tmp_path / "run"
    own: Flags = {"--max_restarts": str(len(faults)), "--save": str(save)}
    status, output, _ = run_with(faults, flags | own, program="train_ppo_ray" if in_ray else "train_ppo")
    assert status == 0, output
    for fault in faults:
        said = rf"{fault.role} ranks \[(0, )?{fault.rank}\] did not finish \w+ within {HANG_SECONDS:g} s"
        if fault.role == "function":
            said = "took longer than its limit of 5 seconds"
        assert re.search(said, output), output
    fates = becomes(faults, len(faults))
    assert output.count("another engine is started") == fates.count("replacement"), output
    assert output.count("starting again after step") == fates.count("restart"), output
    check_same(save, undisturbed)


def test_a_full_disk_costs_a_checkpoint_and_at_the_end_the_run(flags: Flags, tmp_path: Path) -> None:
    """Whichever rank cannot write, those of its role hear of it, and nobody waits for anybody."""
    save = tmp_path / "run"
    faults = [
        Fault(role="actor", rank=1, phase="save", step=2, how="full disk"),
        Fault(role="critic", phase="save", step=6, how="full disk for good"),
    ]
    layout: Flags = {"--tensor-model-parallel-size": "2"}  # of which every rank writes its part
    layout |= {"--critic_tensor_model_parallel_size": "1", "--reward_tensor_model_parallel_size": "1"}
    status, output, _ = run_with(faults, flags | layout | {"--save": str(save)})
    root = re.escape(str(save / "checkpoints"))
    failed = [
        rf"the checkpoint of step {step} could not be written to {root} \({rank}: .*, \d+ MiB free\): {left}"
        for step, rank, left in (
            (2, "actor: rank 1", "there is no complete one yet; the run goes on, and saves again after step 4"),
            (6, "critic: rank 0", "the last complete one is that of step 4"),
        )
    ]
    assert re.search(failed[0], output) and re.search(f"stopped: SaveFailedError: {failed[1]}", output), output
    assert status == 1 and list(metrics(save)) == list(range(STEPS + 1))
    names = {path.name for path in (save / "checkpoints").iterdir()}
    assert names == {"iter_0000003", "iter_0000004", "best", run_checkpoints.LATEST}, "step 3 is the first evaluation"
