"""The picture and the page that a run leaves behind: report.png and report.html."""

import base64
import html
import math
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megarlhf.metrics.keys import METRICS
from megarlhf.metrics.sinks import METRICS_FILE, read_rows

Rows = list[dict[str, Any]]  # as in metrics.jsonl, in the order of their steps; None: not finite


@dataclass(frozen=True)
class Panel:
    """One set of axes: lines over steps, or areas stacked on each other."""

    title: str
    unit: str
    lines: dict[str, str]  # metric -> label
    stacked: bool = False
    percent: bool = False
    log_scale: bool = False


def _both(title: str, unit: str, metric: str, *, percent: bool = False) -> Panel:
    """A metric of a supervised program, such as rm/loss, in training and in evaluation."""
    lines = {metric: "training", metric.replace("/", "/eval_"): "evaluation"}
    return Panel(title, unit, lines, percent=percent)


_LENGTHS = {
    "rollout/response_length_mean": "mean",
    "rollout/response_length_max": "longest",
    "eval/response_length_mean": "evaluation, mean",
}
_MISMATCH = {"rollout/logprob_diff_mean": "mean", "rollout/logprob_diff_max": "largest"}
_PHASES = ("rollout", "reward", "experience", "train", "sync", "eval", "save")
PANELS = (
    Panel("Reward", "mean reward", {"reward/mean": "training", "eval/reward_mean": "evaluation, greedy"}),
    Panel("Right greedy answers", "of prompts with a result", {"eval/accuracy": "accuracy"}, percent=True),
    Panel("KL to the reference", "nats per token", {"kl/mean": "KL"}),
    _both("Loss", "nats per token", "sft/loss"),
    _both("Loss of steps' labels", "nats per step", "prm/loss"),
    _both("Steps judged as labelled", "of steps", "prm/accuracy", percent=True),
    _both("DPO loss", "loss", "dpo/loss"),
    _both("DPO accuracy", "of pairs", "dpo/accuracy", percent=True),
    _both("DPO reward margin", "beta x nats", "dpo/margin"),
    _both("KTO loss", "loss", "kto/loss"),
    _both("KTO accuracy", "of answers", "kto/accuracy", percent=True),
    _both("KTO reward margin", "beta x nats", "kto/margin"),
    _both("Distillation loss", "nats per token", "kd/loss"),
    _both("KL of student and teacher", "nats per token", "kd/kl"),
    _both("Loss of pairs", "nats per pair", "rm/loss"),
    _both("Chosen above rejected", "of pairs", "rm/accuracy", percent=True),
    Panel("Reward", "mean reward", {"rm/chosen_reward": "chosen", "rm/rejected_reward": "rejected"}),
    Panel("Policy loss", "loss", {"policy/loss": "policy"}),
    Panel("Critic loss", "squared reward", {"critic/loss": "critic"}),
    Panel("Response length", "tokens", _LENGTHS),
    Panel("Log-prob mismatch with vLLM", "|difference|, nats", _MISMATCH, log_scale=True),
    Panel("Time per step", "seconds", {f"time/{phase}_seconds": phase for phase in _PHASES}, stacked=True),
    Panel("Throughput", "tokens per second", {"perf/tokens_per_second": "tokens/s"}),
)

# Rows of the summary table, with what counts as best; None where more is neither better nor worse.
SUMMARY = {
    "reward/mean": max,
    "eval/accuracy": max,
    **{f"{name}/{key}": min for name in ("sft", "dpo", "kto", "rm", "prm", "kd") for key in ("loss", "eval_loss")},
    **{f"{name}/{key}": max for name in ("dpo", "kto", "rm", "prm") for key in ("accuracy", "eval_accuracy")},
    **{f"{name}/margin": max for name in ("dpo", "kto", "rm")},
    "kto/kl": None,
    "kd/kl": min,
    "kd/eval_kl": min,
    "kd/teacher_entropy": None,
    "kl/mean": None,
    "policy/loss": None,
    "policy/entropy": None,
    "critic/loss": min,
    "critic/explained_variance": max,
    "rollout/response_length_mean": None,
    "rollout/truncated_frac": None,
    "rollout/logprob_diff_max": min,
    "perf/tokens_per_second": max,
    "time/step_seconds": min,
}

# Told apart by colour-blind readers and in grey; one per line of the panel with the most lines.
COLORS = ("#2a6fbb", "#e08a1e", "#2f9e78", "#b5489a", "#7a5fc7", "#c94f3d", "#7d8794")
INK, FAINT_INK, GRID = "#1f2933", "#5f6b78", "#e3e7ec"
LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": FAINT_INK}
MARKED_POINTS = 40  # a line of at most so many points shows each of them

PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 1180px; margin: 2rem auto;
         padding: 0 1rem; }
  h1 { font-size: 1.6rem; margin-bottom: 0; }
  h2 { font-size: 1.1rem; margin-top: 2rem; }
  p, td.faint, th { color: #5f6b78; }
  img { width: 100%; border: 1px solid #e3e7ec; border-radius: 6px; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e3e7ec; vertical-align: top; }
  th { font-weight: 600; }
  .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  code { font-size: .9em; }
</style>
<h1>$title</h1>
<p>$subtitle</p>
<img alt="Curves of the main metrics over steps" src="data:image/png;base64,$png">
<h2>Main metrics</h2>
<div class="wide"><table>
<tr><th>metric</th><th class="number">first</th><th class="number">last</th><th class="number">best</th>
<th>meaning</th></tr>
$summary
</table></div>
<h2>Configuration</h2>
<div class="wide"><table>
$configuration
</table></div>
</html>
""")


def write_report(run_dir: Path, title: str) -> tuple[Path, Path]:
    """Draw the metrics of a run, RL or SFT, and write a page that stands on its own; returns the page and the picture.

    Reads metrics.jsonl and, where there is one, config.yaml of the run directory.

    Raises:
        ValueError: the run has logged no step.
    """
    rows = read_rows(run_dir / METRICS_FILE)
    if not rows:
        raise ValueError(f"run_dir={run_dir}; its {METRICS_FILE} holds no step, so there is nothing to report on")
    png, page = run_dir / "report.png", run_dir / "report.html"
    _draw(rows, title, png)
    span = f"{run_dir.resolve().name}: steps {rows[0]['step']} to {rows[-1]['step']}"
    minutes = sum(value for _, value in _series(rows, "time/step_seconds")) / 60
    text = PAGE.substitute(
        title=html.escape(title),
        subtitle=html.escape(f"{span}, {minutes:.1f} minutes in steps" if minutes else span),
        png=base64.b64encode(png.read_bytes()).decode(),
        summary="\n".join(_summary_row(rows, key) for key in SUMMARY if _logged(rows, key)),
        configuration=_configuration(run_dir / "config.yaml"),
    )
    page.write_text(text)
    return page, png


def _logged(rows: Rows, key: str) -> list[tuple[int, float | None]]:
    """(step, value) of the steps that logged `key`."""
    return [(row["step"], row[key]) for row in rows if key in row]


def _series(rows: Rows, key: str) -> list[tuple[int, float]]:
    """The same without values that were not finite."""
    return [(step, value) for step, value in _logged(rows, key) if value is not None]


def _draw(rows: Rows, title: str, path: Path) -> None:
    panels = [panel for panel in PANELS if any(_series(rows, key) for key in panel.lines)]
    num_columns = 2 if len(panels) in (2, 4) else min(3, max(1, len(panels)))
    num_rows = -(-len(panels) // num_columns)
    # Not pyplot, which keeps a process's figures in a global and may look for a window.
    figure = Figure(figsize=(4.6 * num_columns, 2.9 * num_rows + 0.6), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, place + 1)
        (_draw_stacked if panel.stacked else _draw_lines)(axes, panel, rows)
        _dress(axes, panel, rows)
    figure.savefig(path)


def _draw_lines(axes: Axes, panel: Panel, rows: Rows) -> None:
    drawn = {label: _logged(rows, key) for key, label in panel.lines.items() if _series(rows, key)}
    for color, (label, points) in zip(COLORS, drawn.items(), strict=False):
        steps = [step for step, _ in points]
        values = [math.nan if value is None else value for _, value in points]  # NaN: a gap in the line
        marker = "o" if len(points) <= MARKED_POINTS else ""
        axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=3.5, label=label)
    if panel.log_scale and all(value > 0 for key in panel.lines for _, value in _series(rows, key)):
        axes.set_yscale("log")
    if len(drawn) > 1:
        axes.legend(**LEGEND, fontsize=8)


def _draw_stacked(axes: Axes, panel: Panel, rows: Rows) -> None:
    steps = [row["step"] for row in rows]
    tops = [0.0] * len(rows)
    for color, (key, label) in zip(COLORS, panel.lines.items(), strict=False):
        if not _series(rows, key):
            continue
        heights = [row.get(key) or 0.0 for row in rows]
        axes.bar(steps, heights, bottom=tops, width=1.0, color=color, linewidth=0, label=label)
        tops = [top + height for top, height in zip(tops, heights, strict=True)]
    axes.set_ylim(0, 1.35 * max(tops) or 1.0)  # room for the legend
    axes.legend(**LEGEND, fontsize=7.5, loc="upper left", ncols=4, handlelength=1, columnspacing=1, borderaxespad=0)


def _dress(axes: Axes, panel: Panel, rows: Rows) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_xlabel("step", fontsize=8.5, color=FAINT_INK)
    axes.set_ylabel(panel.unit, fontsize=8.5, color=FAINT_INK)
    axes.tick_params(which="both", labelsize=8, colors=FAINT_INK, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    first, last = rows[0]["step"], rows[-1]["step"]
    margin = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - margin, last + margin)  # the same for all panels, so that they can be compared
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        axes.set_ylim(bottom=0.0)


def _summary_row(rows: Rows, key: str) -> str:
    logged = _logged(rows, key)
    first, last = ("not finite" if value is None else f"{value:.4g}" for _, value in (logged[0], logged[-1]))
    pick, points = SUMMARY[key], _series(rows, key)
    best = ""
    if pick is not None and points:
        step, value = pick(points, key=lambda point: point[1])
        best = f"{value:.4g} (step {step})"
    cells = "".join(f'<td class="number">{cell}</td>' for cell in (first, last, best))
    return f'<tr><td><code>{key}</code></td>{cells}<td class="faint">{html.escape(METRICS[key])}</td></tr>'


def _configuration(path: Path) -> str:
    if not path.exists():
        return "<tr><td>The run directory holds no config.yaml.</td></tr>"
    config = yaml.safe_load(path.read_text()) or {}
    rows = (map(html.escape, (str(key), str(value))) for key, value in config.items())
    return "\n".join(f"<tr><td><code>{key}</code></td><td><code>{value}</code></td></tr>" for key, value in rows)
