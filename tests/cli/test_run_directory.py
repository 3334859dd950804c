"""What a start writes into the run directory."""

from pathlib import Path

from megarlhf.cli.run import open_run_directory, open_sinks, resumed_step
from megarlhf.config.arguments import LoggingArguments


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


def test_steps_of_a_start_without_a_checkpoint_are_logged_again(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n')
    logging = LoggingArguments(save=str(tmp_path), load_checkpoint=True).continued()
    sinks = open_sinks(logging, {}, total_steps=3, resumed_step=resumed_step(logging, {}))
    sinks.log(1, {})
    sinks.close()
    assert metrics.read_text() == '{"step": 1}\n'
