"""The launchers' flags are flags of the program, and their plans are possible."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def dry_run(script: str, tmp_path: Path, *flags: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / script), "--dry-run", *flags],
        env=os.environ | {"SAVE": str(tmp_path / "run with space")} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_documented(script: str, printed: str, *flags: str) -> None:
    """The table of bytes is the one in docs/memory.md; with MEGARLHF_WRITE_DOCS=1 it is put there."""
    table = printed[re.search(r"^(GiB|MiB) on device ", printed, re.MULTILINE).start() :].strip()  # type: ignore[union-attr]
    page = ROOT / "docs" / "memory.md"
    shown = " ".join((f"examples/{script}", "--dry-run", *flags))
    block = re.compile(rf"(?<=^`{re.escape(shown)}`\n\n```\n).*?(?=\n```$)", re.DOTALL | re.MULTILINE)
    if os.environ.get("MEGARLHF_WRITE_DOCS"):
        page.write_text(block.sub(lambda _: table, page.read_text()))
    assert block.findall(page.read_text()) == [table], f"{page}: MEGARLHF_WRITE_DOCS=1 renews it"


def test_llama_3_8b_on_eight_gpus(llama_3_8b: Path, tmp_path: Path) -> None:
    data = tmp_path / "math.jsonl"
    data.write_text('{"input": "1 + 1", "label": "2"}\n')
    script, flags = "ppo_llama3_8b_h100.sh", ("--gpu_memory_gib", "79")
    printed = dry_run(script, tmp_path, *flags, MODEL=str(llama_3_8b), PROMPT_DATA=str(data))
    check_documented(script, printed, *flags)
    lines = [line.split() for line in printed.splitlines()]
    for role in ("actor+reference", "critic", "rollout"):
        assert sum(line[:1] == [role] and line[1].isdecimal() for line in lines if len(line) > 1) == 8, role
    assert "tensor_model_parallel_size: 4" in printed and "bf16: true" in printed


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the launchers put SmolLM2 and the data; made by the first."""
    directory = tmp_path_factory.mktemp("smollm2")
    return {"MODEL": str(directory / "a model"), "DATA": str(directory / "some data")}


@pytest.mark.parametrize("script", ["ppo_smollm2_cpu.sh", "grpo_smollm2_cpu.sh"])
def test_smollm2_on_two_cores(script: str, places: dict[str, str], tmp_path: Path) -> None:
    printed = dry_run(script, tmp_path, **places, PROMPTS="4")
    check_documented(script, printed)
    assert "rollout_batch_size: 4" in printed
    assert not (tmp_path / "run with space").exists()
