"""What a distributed checkpoint holds beside tensors is read without running what its pickles name."""

import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megarlhf.engine import checkpoint
from megarlhf.engine.checkpoint import MCoreLoadPlanner, dist_checkpointing
from tests.distributed.pool import RankPool


class Attack:
    """Pickled, it creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def state(value: Any) -> dict[str, Any]:
    return {"extra": dist_checkpointing.ShardedObject("extra", value, (1,), (0,))}


def written_and_read(rank: int, world_size: int, init_method: str, directory: Path, touched: Path) -> tuple[Any, str]:
    """An object that comes back; and what is said where the bytes on disk are an attacker's."""
    torch.distributed.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    try:
        given = {"amax": torch.tensor([2.5]), "steps": 7}
        checkpoint._save(state(given), directory)
        found = dist_checkpointing.load(state(None), str(directory))["extra"]
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        (place,) = [info for index, info in metadata.storage_data.items() if index.fqn.startswith("extra")]
        harmful = io.BytesIO()
        torch.save(Attack(touched), harmful)
        before = (directory / place.relative_path).read_bytes()
        (directory / place.relative_path).write_bytes(before + harmful.getvalue())
        place.offset, place.length = len(before), len(harmful.getvalue())
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
        try:
            dist_checkpointing.load(state(None), str(directory))
        except CheckpointException as error:
            return found, str(error)
        return found, ""
    finally:
        torch.distributed.destroy_process_group()


def test_objects_come_back_and_code_does_not_run(ranks: RankPool, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    ((found, said),) = ranks.run(1, written_and_read, tmp_path / "checkpoint", touched)
    assert found["steps"] == 7 and torch.equal(found["amax"], torch.tensor([2.5]))
    assert "Weights only load failed" in said and not touched.exists()


def test_flattened_states_too() -> None:
    value = io.BytesIO()
    torch.save(io.BytesIO(b"kept"), value)
    value.seek(0)
    planner = SimpleNamespace(flatten_state_dict=True, mappings={"a.b": ("a", "b")}, original_state_dict={"a": {}})
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="a.b"))
    MCoreLoadPlanner.load_bytes(planner, item, value)  # type: ignore[arg-type]
    assert planner.original_state_dict["a"]["b"].getvalue() == b"kept"
