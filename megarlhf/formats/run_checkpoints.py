"""Where checkpoints lie and when one counts as complete; files only, no Megatron.

    checkpoints/latest_checkpointed_iteration.txt
    checkpoints/iter_0000010/run_state.json          what the loop needs: step, coefficients, identity
    checkpoints/iter_0000010/actor/, critic/         torch_dist: weights, optimizer, schedule
    checkpoints/iter_0000010/average/                torch_dist: weights averaged over the steps, with enable_ema
    checkpoints/best                                 with --best_metric a link to the iteration of the best evaluation

A save goes to `iter_0000010.partial/`, is synced to disk and renamed; then the latest pointer is replaced, so that a
process killed at any moment leaves the last complete checkpoint in place.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from megarlhf.formats.staging import replace_directory, replace_link, staging_path, sync, write_whole

OPTIMIZER_STATE = "optimizer_state"  # entry of an identity: what of the layout decides how optimizer state is kept
AVERAGE = "average"  # directory of a checkpoint
LATEST = "latest_checkpointed_iteration.txt"
BEST = "best"


class SaveFailedError(RuntimeError):
    """A checkpoint cannot be written, and all who take part know; what they hold in memory is as it was."""


def iteration_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"iter_{step:07d}"


def staging_directory(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root / f"iter_{step:07d}.partial"


def begin(root: Path, step: int) -> Path:
    """An empty directory for a new checkpoint; what an interrupted save left there is removed."""
    staging = staging_directory(root, step)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def abandon(root: Path, step: int) -> None:
    """Remove what a save that failed has written: on a full disk the room is needed."""
    staging_path(root / LATEST).unlink(missing_ok=True)
    shutil.rmtree(staging_directory(root, step), ignore_errors=True)
    if _latest_step(root) != step:  # it is complete, and nothing names it
        shutil.rmtree(iteration_directory(root, step), ignore_errors=True)


def save_failed(root: Path, step: int, cause: Exception) -> SaveFailedError:
    """The sentence for a save that has been abandoned, with what is left."""
    left = _latest_step(root)
    kept = "there is no complete one yet" if left is None else f"the last complete one is that of step {left}"
    free = f", {shutil.disk_usage(root).free / 2**20:.0f} MiB free" if root.is_dir() else ""
    return SaveFailedError(f"the checkpoint of step {step} could not be written to {root} ({cause}{free}): {kept}")


def _latest_step(root: Path) -> int | None:
    """What the pointer names, whether it is there or not."""
    pointer = root / LATEST
    text = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    return int(text) if text.isdecimal() else None


def commit(root: Path, step: int, run_state: dict[str, Any], *, keep: int, most_gib: float | None = None) -> Path:
    """Make the checkpoint under `begin`'s directory the latest one, then drop the oldest of its past.

    Args:
        run_state: the step of its entry "best", if it has one, stays as well, and BEST links to it.
        keep: how many stay; 0: all.
        most_gib: what all together may take; the new one stays in any case.
    """
    staging, final = staging_directory(root, step), iteration_directory(root, step)
    (staging / "run_state.json").write_text(json.dumps(run_state, indent=1, sort_keys=True))
    sync(*staging.rglob("*"), staging)
    replace_directory(staging, final)
    sync(root)
    write_whole(root / LATEST, str(step))
    best, besides = run_state.get("best", {}).get("step"), list[Path]()
    if best is not None and (kept := iteration_directory(root, best)).is_dir():
        replace_link(root / BEST, kept)
        besides = [kept] if kept != final else []
    complete = sorted(path for path in root.glob("iter_*") if not path.name.endswith(".partial"))
    past = [path for path in complete[: complete.index(final) + 1] if path not in besides]
    for number, old in enumerate(past[:-1]):
        size = 0.0 if most_gib is None else sum(map(_gib, past[number:] + besides))
        if 0 < keep < len(past) - number or (most_gib is not None and size > most_gib):
            shutil.rmtree(old)
    return final


def _gib(directory: Path) -> float:
    """What its files take; it asks the file system for each of them."""
    return sum(file.stat().st_size for file in directory.rglob("*")) / 2**30


def latest(root: Path) -> tuple[int, Path, dict[str, Any]]:
    """Step, directory and loop state of the latest complete checkpoint.

    Raises:
        ValueError: there is none, or the pointer names no step, or an incomplete one.
    """
    pointer, step = root / LATEST, _latest_step(root)
    if not pointer.is_file():
        raise ValueError(f"load={root.parent}; {pointer} is missing: no complete checkpoint there")
    if step is None:
        text = pointer.read_text(errors="replace").strip()
        raise ValueError(f"load={root.parent}; {pointer} holds {text!r}, not a step: name a saved one")
    directory = iteration_directory(root, step)
    state = directory / "run_state.json"
    if not state.is_file():
        raise ValueError(f"load={root.parent}; {directory} is incomplete: run_state.json is missing")
    return step, directory, json.loads(state.read_text())


def config_entries(directory: Path) -> dict[str, float]:
    """What the run of a model's checkpoint, such as iter_0000010/actor, adds to the config.json of its export."""
    state = directory.parent / "run_state.json"
    found: dict[str, float] = json.loads(state.read_text()).get("config_entries", {}) if state.is_file() else {}
    return found


def check_identity(
    saved: dict[str, Any], present: dict[str, Any], directory: Path, *, with_optimizer: bool = True
) -> None:
    """Refuse a checkpoint of another model, or of a run that draws other prompts, or that keeps optimizers otherwise.

    Raises:
        ValueError: naming every entry that differs; that of the optimizers only where they are to be loaded too.
    """
    compared = [key for key in present if with_optimizer or key != OPTIMIZER_STATE]
    differing = [key for key in compared if saved.get(key) != present[key]]
    if differing == [OPTIMIZER_STATE]:
        raise ValueError(
            f"load={directory}; its optimizers were kept with {saved.get(OPTIMIZER_STATE)}, now "
            f"{present[OPTIMIZER_STATE]}, which Megatron-Core cannot carry over: give the same values, or set "
            "no_load_optim to continue with the weights alone"
        )
    if differing:
        details = "; ".join(f"{key}: saved {saved.get(key)}, now {present[key]}" for key in differing)
        raise ValueError(f"load={directory}; it is of another model or run ({details}): give the same values")
