"""Each sink read back the way its reader would."""

import io
import json
import math
import time
from pathlib import Path

import pytest
from rich.console import Console

from megarlhf.metrics.sinks import ConsoleSink, JsonlSink, Sinks, TensorBoardSink, WandbSink, read_rows


def test_jsonl_round_trip_is_on_disk_before_close(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(1, {"reward/mean": 0.1 + 0.2, "sync/version": 1})
    sink.log(2, {"reward/mean": -1e-9})
    assert read_rows(path) == [
        {"step": 1, "reward/mean": 0.1 + 0.2, "sync/version": 1.0},
        {"step": 2, "reward/mean": -1e-9},
    ]
    sink.close()


def test_jsonl_refuses_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(5, {"kl/mean": 0.0})
    with pytest.raises(ValueError, match="kl/meam.*kl/mean"):
        sink.log(6, {"kl/meam": 0.0})
    with pytest.raises(ValueError, match="step=5 after step 5"):
        sink.log(5, {"kl/mean": 0.0})
    sink.close()
    assert [row["step"] for row in read_rows(path)] == [5]


def test_jsonl_writes_what_is_not_finite_as_null_and_resumes_from_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(1, {"reward/mean": 1.25, "kl/mean": math.nan})
    sink.log(2, {"policy/ratio_mean": math.inf, "policy/loss": -math.inf, "kl/mean": 1e300})
    sink.close()
    expected = [
        '{"step": 1, "reward/mean": 1.25, "kl/mean": null}',
        '{"step": 2, "policy/ratio_mean": null, "policy/loss": null, "kl/mean": 1e+300}',
    ]
    assert path.read_text().splitlines() == expected
    JsonlSink(path, resumed_step=1).close()
    assert path.read_text().splitlines() == expected[:1]


def test_jsonl_truncates_to_the_resumed_step_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2, 3, 4):
        sink.log(step, {"reward/mean": step / 10})
    sink.close()

    resumed = JsonlSink(path, resumed_step=2)
    with pytest.raises(ValueError, match="step=2 after step 2"):
        resumed.log(2, {"reward/mean": 9.0})
    resumed.log(3, {"reward/mean": 9.0})
    resumed.close()
    assert [(row["step"], row["reward/mean"]) for row in read_rows(path)] == [(1, 0.1), (2, 0.2), (3, 9.0)]
    assert list(tmp_path.iterdir()) == [path]
    anew = JsonlSink(path, resumed_step=-1)
    anew.log(0, {"reward/mean": 5.0})
    anew.close()
    assert [row["step"] for row in read_rows(path)] == [0]


def test_jsonl_line_that_a_killed_process_left_half_written_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kl/mean": 0.5}\n{"step": 2, "kl/me')
    assert [row["step"] for row in read_rows(path)] == [1]
    sink = JsonlSink(path, resumed_step=1)
    sink.log(2, {"kl/mean": 0.25})
    sink.close()
    assert [json.loads(line)["kl/mean"] for line in path.read_text().splitlines()] == [0.5, 0.25]


def test_tensorboard_files_hold_the_resumed_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        sink.log(step, {"reward/mean": step / 4, "kl/mean": math.inf})
    sink.close()
    resumed = TensorBoardSink(tmp_path, resumed_step=1)
    resumed.log(2, {"reward/mean": 8.0})
    resumed.close()

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 8.0)]
    assert events.Tags()["scalars"] == ["reward/mean"]


def test_wandb_without_a_key_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match="use_wandb=True.*WANDB_API_KEY.*WANDB_MODE=offline"):
        WandbSink(tmp_path, project="p", run_name="r", config={})


def test_all_sinks_of_a_run_get_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = io.StringIO()
    sinks = Sinks(
        tmp_path / "run",
        total_steps=2,
        use_tensorboard=True,
        use_wandb=True,
        entity="a-team",
        group="a-group",
        config={"seed": 42},
        console=Console(file=out, force_terminal=False),
    )
    sinks.phase("rollout")
    sinks.log(1, {"reward/mean": 0.5, "kl/mean": math.inf})
    with pytest.raises(ValueError, match="reward/meen"):
        sinks.log(2, {"reward/meen": 1.0})
    sinks.close()

    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 1
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (recorded,) = offline.glob("run-*.wandb")
    deadline = time.monotonic() + 60
    while b"reward/mean" not in recorded.read_bytes():  # W&B's own process may write the file's last block later
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert b"kl/mean" not in recorded.read_bytes()
    assert all(word in recorded.read_bytes() for word in (b"a-team", b"a-group"))
    assert out.getvalue().startswith("step 1/2  reward 0.500")


def test_a_metric_that_is_not_finite_ends_no_run_and_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = io.StringIO()
    sinks = Sinks(tmp_path, total_steps=3, console=Console(file=out, force_terminal=False))
    sinks.log(1, {"reward/mean": 0.5, "kl/mean": math.inf})
    sinks.log(2, {"reward/mean": 0.5, "kl/mean": math.nan, "policy/ratio_mean": math.inf})
    sinks.log(3, {"reward/mean": 0.5, "kl/mean": 0.25})
    sinks.close()
    assert [row["kl/mean"] for row in read_rows(tmp_path / "metrics.jsonl")] == [None, None, 0.25]
    assert [record.getMessage() for record in caplog.records] == [
        "metric kl/mean=inf in step 1 is not finite: null in metrics.jsonl",
        "metric policy/ratio_mean=inf in step 2 is not finite: null in metrics.jsonl",
    ]
    assert [line.split("  ")[2] for line in out.getvalue().splitlines()] == ["kl inf", "kl nan", "kl 0.2500"]


def test_a_fresh_run_does_not_mix_with_the_metrics_of_another(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    first = Sinks(tmp_path, total_steps=4, console=console)
    for step in (1, 2, 3):
        first.log(step, {"kl/mean": 0.0})
    first.close()
    with pytest.raises(ValueError, match=f"save={tmp_path}.*up to step 3.*load"):
        Sinks(tmp_path, total_steps=4, console=console)

    resumed = Sinks(tmp_path, total_steps=4, resumed_step=2, console=console)
    resumed.log(3, {"kl/mean": 1.0})
    resumed.close()
    assert [row["kl/mean"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0.0, 0.0, 1.0]


def test_console_prints_a_plain_line_an_interval_where_there_is_no_terminal() -> None:
    out, seconds = io.StringIO(), iter([0.0, 20.0, 50.0])
    console = Console(file=out, force_terminal=False, width=40)
    sink = ConsoleSink(total_steps=15, first_step=10, log_interval=2, console=console, clock=lambda: next(seconds))
    sink.phase("rollout")
    sink.log(11, {"reward/mean": 0.25, "eval/accuracy": 0.5})
    sink.log(12, {"reward/mean": 0.5, "kl/mean": 0.0125, "perf/tokens_per_second": 1234.4, "policy/loss": 7.0})
    sink.log(13, {"reward/mean": 0.75})
    sink.log(15, {"reward/mean": 1.0})
    sink.close()
    # 20 s for 2 steps and 3 to go, then 50 s for 5 and none to go; the accuracy of step 11 is told with step 12.
    assert out.getvalue().splitlines() == [
        "step 12/15  reward 0.500  kl 0.0125  eval accuracy 50.0%  1,234 tokens/s  0:00:30 left",
        "step 15/15  reward 1.000  0:00:00 left",
    ]


def test_console_on_a_terminal_shows_phase_and_numbers() -> None:
    out = io.StringIO()
    sink = ConsoleSink(total_steps=4, console=Console(file=out, force_terminal=True, width=150, color_system=None))
    sink.log(1, {"reward/mean": 0.5, "eval/accuracy": 0.25})
    sink.phase("train")
    sink.log(2, {"reward/mean": 0.625})
    sink.close()
    last = [line for line in out.getvalue().splitlines() if "step" in line][-1]
    for part in ("2/4", "train", "reward 0.625", "eval accuracy 25.0%", "left"):
        assert part in last
