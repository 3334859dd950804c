"""Where metrics go: a JSONL file, the console, TensorBoard and Weights & Biases."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from megarlhf.metrics.keys import check_metrics

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"  # inside the run directory

_JUDGED = ("rm", "prm", "dpo", "kto")

# What a person watches, in this order. A run shows those that it logs.
CONSOLE_METRICS = {
    "reward/mean": "reward {:.3f}",
    "kl/mean": "kl {:.4f}",
    "sft/loss": "loss {:.4f}",
    "sft/eval_loss": "eval loss {:.4f}",
    **{f"{name}/loss": "loss {:.4f}" for name in ("rm", "prm", "dpo", "kto", "kd")},
    "kd/kl": "kl to the teacher {:.4f}",
    **{f"{name}/accuracy": "accuracy {:.1%}" for name in _JUDGED},
    **{f"{name}/eval_accuracy": "eval accuracy {:.1%}" for name in _JUDGED},
    "eval/accuracy": "eval accuracy {:.1%}",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
}


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers which every reader can draw."""
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, in order; none where there is no file. None: a value that was not finite.

    A last line without its newline, which a killed process leaves behind, is no row.
    """
    if not path.exists():
        return []
    complete, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


class JsonlSink:
    """One JSON object a step in a file: `step`, then the step's metrics. A logged line is flushed at once.

    JSON has no NaN and no infinity: they become null. Of the rows that are there, those up to `resumed_step` are kept;
    later ones, and a half-written last line, go.

    Raises:
        ValueError: a fresh run where another's metrics are.
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(path)
        if rows and resumed_step is None:
            raise ValueError(
                f"save={path.parent}; it holds the metrics of a run up to step {rows[-1]['step']}, and a fresh run "
                "would mix with them: set load to that run's directory to continue it, or save to a new directory"
            )
        kept = [row for row in rows if resumed_step is not None and row["step"] <= resumed_step]
        self._last_step = kept[-1]["step"] if kept else None
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(whole, path)  # all or nothing: the file is the record of the run
        self._file = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row.

        Raises:
            ValueError: an unknown key, or a step that does not follow the last one.
        """
        check_metrics(metrics)
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step={step} after step {self._last_step} in {self._path}: steps go up, one row for each")
        values = {key: float(value) if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Scalars in a TensorBoard event file. On resume, steps past `resumed_step` of earlier files are hidden."""

    def __init__(self, directory: Path, *, resumed_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, for those who ask for it

        self._writer = SummaryWriter(str(directory), purge_step=None if resumed_step is None else resumed_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write each finite metric as a scalar, and the file out."""
        for key, value in finite(metrics).items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run, whose files lie in `directory`/wandb.

    The key comes from WANDB_API_KEY; with WANDB_MODE=offline none is needed, and `wandb sync` uploads the run later.
    W&B keeps no second value for a step, so every start of a resumed run is a W&B run of its own; they share the
    group, `run_name` if None is given.

    Raises:
        ValueError: W&B is to be online and WANDB_API_KEY is not set.
    """

    def __init__(
        self,
        directory: Path,
        *,
        project: str,
        run_name: str,
        config: Mapping[str, Any],
        entity: str | None = None,
        group: str | None = None,
    ) -> None:
        if os.environ.get("WANDB_MODE", "online") == "online" and not os.environ.get("WANDB_API_KEY"):
            raise ValueError(
                "use_wandb=True; WANDB_API_KEY is not set, and a run has nobody to ask for it: set WANDB_API_KEY, or "
                "WANDB_MODE=offline to write to disk alone"
            )
        import wandb  # a second to import, for those who ask for it

        directory.mkdir(parents=True, exist_ok=True)  # W&B falls back to a temporary folder where it is missing
        self._run = wandb.init(
            dir=directory,
            project=project,
            name=run_name,
            entity=entity,
            group=group or run_name,
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),  # its lines would break the progress display
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's finite metrics."""
        self._run.log(finite(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class ConsoleSink:
    """Progress on the terminal: step, phase under way, main metrics and time left.

    Where the output is not a terminal (a log file, a pipe) it prints one plain line every `log_interval` steps.

    Args:
        first_step: steps done before this process began, which its time left leaves out.
        unit: what is counted.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        log_interval: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "step",
    ) -> None:
        self._unit = unit
        self._total_steps, self._first_step, self._log_interval = total_steps, first_step, log_interval
        self._clock, self._start = clock, clock()
        self._latest: dict[str, float] = {}
        console = console or Console()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn(unit),
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TextColumn("[cyan]{task.fields[phase]:<10}"),
            # The one column that may break into lines on a narrow terminal.
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=False)),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, phase="starting", numbers="")
        self._progress.start()

    def phase(self, name: str) -> None:
        """Show the phase that is under way; plain output has no place for it."""
        self._progress.update(self._task, phase=name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show one finished step; a metric that comes now and then, such as eval/accuracy, is kept between lines."""
        self._latest.update(metrics)
        if not self._progress.disable:
            self._progress.update(self._task, completed=step, numbers=self._numbers(step))
        elif step % self._log_interval == 0 or step == self._total_steps:
            line = f"{self._unit} {step}/{self._total_steps}  {self._numbers(step)}"
            self._progress.console.print(line, soft_wrap=True, markup=False, highlight=False)
            self._latest.clear()

    def close(self) -> None:
        """Leave the display as it stands."""
        self._progress.stop()

    def _numbers(self, step: int) -> str:
        shown = [text.format(self._latest[key]) for key, text in CONSOLE_METRICS.items() if key in self._latest]
        steps_done = step - self._first_step
        if steps_done > 0:
            seconds = (self._clock() - self._start) / steps_done * (self._total_steps - step)
            shown.append(f"{timedelta(seconds=round(seconds))} left")
        return "  ".join(shown)


class Sinks:
    """Everything a run logs to: always the JSONL file and the console, TensorBoard and W&B where asked for.

    Args:
        directory: of the run; holds metrics.jsonl, tensorboard/ and wandb/.
        log_interval: steps between two lines of plain console output; the other sinks take every step.
        project, run_name, entity, group, config: what W&B shows; run_name None is the name of the directory.
        resumed_step: last step of the checkpoint that the run continues from; rows past it are dropped, for -1 all of
            them. None: a fresh run.
    Raises:
        ValueError: a fresh run in a directory that holds another's metrics, or W&B online without its key.
    """

    def __init__(
        self,
        directory: Path,
        *,
        total_steps: int,
        log_interval: int = 1,
        use_tensorboard: bool = False,
        use_wandb: bool = False,
        project: str = "megarlhf",
        run_name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
        resumed_step: int | None = None,
        console: Console | None = None,
    ) -> None:
        self._warned: set[str] = set()  # metrics that were not finite once
        with ExitStack() as opened:  # closes what is open when a later one fails
            # The file comes first: it checks what the others take as it is.
            file = opened.enter_context(closing(JsonlSink(directory / METRICS_FILE, resumed_step=resumed_step)))
            self._sinks: list[JsonlSink | TensorBoardSink | WandbSink | ConsoleSink] = [file]
            if use_tensorboard:
                board = TensorBoardSink(directory / "tensorboard", resumed_step=resumed_step)
                self._sinks.append(opened.enter_context(closing(board)))
            if use_wandb:
                name = run_name if run_name is not None else directory.resolve().name
                wandb = WandbSink(
                    directory, project=project, run_name=name, config=config or {}, entity=entity, group=group
                )
                self._sinks.append(opened.enter_context(closing(wandb)))
            first = max(resumed_step or 0, 0)
            self._console = ConsoleSink(
                total_steps=total_steps, first_step=first, log_interval=log_interval, console=console
            )
            self._sinks.append(opened.enter_context(closing(self._console)))
            self._opened = opened.pop_all()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand one step's metrics to every sink; the first value of a metric that is not finite is warned of.

        Raises:
            ValueError: as JsonlSink.log; no sink has taken anything then.
        """
        for sink in self._sinks:
            sink.log(step, metrics)
        for key in metrics.keys() - finite(metrics).keys() - self._warned:
            logger.warning("metric %s=%s in step %d is not finite: null in %s", key, metrics[key], step, METRICS_FILE)
            self._warned.add(key)

    def phase(self, name: str) -> None:
        """Show on the console what the run is doing."""
        self._console.phase(name)

    def close(self) -> None:
        """Close all of them, also when one fails."""
        self._opened.close()
