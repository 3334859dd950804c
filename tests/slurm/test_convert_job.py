"""slurm/convert.sbatch: there and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_a_checkpoint_comes_back_as_it_was(cluster: Cluster, assets: Path) -> None:
    """Both jobs stand in the queue, the second for the first."""
    there, back = cluster.directory / "megatron", cluster.directory / "hf"
    words = ("--cpus-per-task=1", f"--output={cluster.directory}/%j.out")
    settings = {"SAVE": str(cluster.directory / "conversion")}
    steps = ("slurm/convert.sbatch", "hf-to-megatron", "--load", str(assets / "model"), "--save", str(there))
    first = cluster.submit(*words, *steps, **settings)
    steps = ("slurm/convert.sbatch", "megatron-to-hf", "--load", str(there), "--save", str(back))
    second = cluster.submit(*words, f"--dependency=afterok:{first}", *steps, **settings)
    assert cluster.wait(second, 120) == "COMPLETED", [path.read_text() for path in cluster.directory.glob("*.out")]
    given, found = (load_file(directory / "model.safetensors") for directory in (assets / "model", back))
    assert given.keys() == found.keys() and all(torch.equal(found[name], given[name]) for name in given)
    cluster.check_empty()
