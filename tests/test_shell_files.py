"""Every shell file of the repository is one for bash, and for shellcheck."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def is_shell(name: str) -> bool:
    path = ROOT / name
    if path.suffix in (".sh", ".sbatch", ".env"):
        return True
    with path.open("rb") as file:
        first = file.readline()
    return first.startswith(b"#!") and first.split()[-1].endswith(b"sh")


def shell_files() -> list[str]:
    kinds = ("--cached", "--others", "--exclude-standard")
    known = subprocess.check_output(["git", "-C", str(ROOT), "ls-files", "-z", *kinds])
    return sorted(name for name in known.decode().split("\0") if (ROOT / name).is_file() and is_shell(name))


@pytest.mark.parametrize("name", shell_files())
def test_bash_reads(name: str) -> None:
    done = subprocess.run(["bash", "-n", name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: requirements/system.sh installs it")
def test_shellcheck_finds_nothing() -> None:
    """Together, since files that source others are checked with them."""
    files = shell_files()
    assert {".ci/run", "examples/demo/run.sh", "slurm/ppo_ray.sbatch", "slurm/site.env"} <= set(files)
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
