"""What a start writes into the run directory."""

from pathlib import Path

from megarlhf.cli.run import open_run_directory


def test_every_start_keeps_its_configuration(tmp_path: Path) -> None:
    save = tmp_path / "runs" / "first"
    for start in range(1, 13):
        assert open_run_directory(str(save), f"start: {start}\n") == save
        assert (save / "config.yaml").read_text() == f"start: {start}\n", "readers see the latest"
    (save / "config-start-3.yaml").unlink()  # a gap is not filled: numbers go up with time
    (save / "config-start-mine.yaml").write_text("")
    open_run_directory(str(save), "start: 13\n")
    kept = {path.name: path.read_text() for path in save.glob("config-start-[0-9]*.yaml")}
    assert kept == {f"config-start-{n}.yaml": f"start: {n}\n" for n in range(1, 13) if n != 3}
    assert not (save / "config.yaml.partial").exists()
