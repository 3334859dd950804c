"""The report of a run, from metrics made by hand."""

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megarlhf.metrics.keys import METRICS
from megarlhf.metrics.report import COLORS, PANELS, SUMMARY, write_report

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_run(directory: Path, rows: Sequence[Mapping[str, float | None]]) -> None:
    directory.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells_of(page: str, key: str) -> list[str]:
    """Numbers of the summary row of a metric: first, last, best."""
    (row,) = re.findall(f"<tr><td><code>{key}</code></td>(.*?)</tr>", page)
    return re.findall(r'<td class="number">(.*?)</td>', row)


def test_report_of_an_rl_run(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        [
            {"step": 1, "reward/mean": 0.25, "kl/mean": 0.0, "time/rollout_seconds": 9.0, "time/step_seconds": 30.0},
            {"step": 2, "reward/mean": 0.75, "kl/mean": 0.01, "time/rollout_seconds": 8.0, "time/step_seconds": 60.0},
            {"step": 3, "reward/mean": 0.5, "kl/mean": 0.02, "time/rollout_seconds": 7.0, "time/step_seconds": 90.0},
        ],
    )
    tmp_path.joinpath("config.yaml").write_text("pretrain: /models/<tiny>\nkl_target: null\n")
    page_path, png_path = write_report(tmp_path, "Sums & <tests>")

    assert (page_path, png_path) == (tmp_path / "report.html", tmp_path / "report.png")
    page, png = page_path.read_text(), png_path.read_bytes()
    assert png.startswith(PNG_SIGNATURE)
    (embedded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(embedded) == png
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<title>Sums &amp; &lt;tests&gt;</title>" in page
    assert "steps 1 to 3, 3.0 minutes in steps" in page
    assert cells_of(page, "reward/mean") == ["0.25", "0.5", "0.75 (step 2)"]
    assert cells_of(page, "time/step_seconds") == ["30", "90", "30 (step 1)"]
    assert cells_of(page, "kl/mean") == ["0", "0.02", ""]
    assert "critic/loss" not in page
    assert "<code>pretrain</code></td><td><code>/models/&lt;tiny&gt;</code>" in page


def test_report_of_an_sft_run_without_a_configuration(tmp_path: Path) -> None:
    rows = [{"step": step, "sft/loss": 2.0 / step, "perf/tokens_per_second": 150.0} for step in (1, 2, 4)]
    rows[1]["sft/eval_loss"] = 1.5
    write_run(tmp_path, rows)
    page, png = write_report(tmp_path, "SFT")
    assert png.read_bytes().startswith(PNG_SIGNATURE)
    assert cells_of(page.read_text(), "sft/loss") == ["2", "0.5", "0.5 (step 4)"]
    assert cells_of(page.read_text(), "sft/eval_loss") == ["1.5", "1.5", "1.5 (step 2)"]


def test_report_of_one_step_and_zeros(tmp_path: Path) -> None:
    write_run(tmp_path, [{"step": 7, "rollout/logprob_diff_max": 0.0, "time/sync_seconds": 0.0}])
    assert write_report(tmp_path, "One")[1].read_bytes().startswith(PNG_SIGNATURE)


def test_what_is_not_finite_is_a_gap_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: dict[str, list[float]] = {}
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, label, **rest: lines.update({label: y}))
    monkeypatch.setattr("matplotlib.axes.Axes.set_yscale", lambda self, scale: lines.update({scale: []}))
    values: list[tuple[float | None, ...]] = [(1.0, 0.5, None, 1e-3), (None, None, None, None), (2.0, 0.25, None, 2e-3)]
    keys = ("policy/loss", "critic/loss", "kl/mean", "rollout/logprob_diff_max")
    rows = [{"step": step, **dict(zip(keys, row, strict=True))} for step, row in enumerate(values)]
    rows.append({"step": 3, "policy/loss": None, "time/train_seconds": None, "time/save_seconds": 2.0})
    write_run(tmp_path, rows)
    page = write_report(tmp_path, "Gaps")[0].read_text()
    assert str(lines["policy"]) == str([1.0, math.nan, 2.0, math.nan])
    assert str(lines["critic"]) == str([0.5, math.nan, 0.25])
    assert "KL" not in lines, "no value, no line"
    assert "log" in lines, "the others are above 0"
    assert cells_of(page, "policy/loss") == ["1", "not finite", ""]
    assert cells_of(page, "critic/loss") == ["0.5", "0.25", "0.25 (step 2)"]
    assert cells_of(page, "kl/mean") == ["not finite", "not finite", ""]


@pytest.mark.parametrize("value", [None, 3e38, -3e38])
def test_report_of_a_run_that_went_wrong_at_once(tmp_path: Path, value: float | None) -> None:
    write_run(tmp_path, [{"step": 1, "critic/loss": value, "reward/mean": 0.0}, {"step": 2, "critic/loss": value}])
    assert write_report(tmp_path, "Broken")[1].read_bytes().startswith(PNG_SIGNATURE)
    write_run(tmp_path, [{"step": 1, "critic/loss": None}])
    assert write_report(tmp_path, "Nothing to draw")[1].read_bytes().startswith(PNG_SIGNATURE)


def test_panels_without_data_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, title, **rest: titles.append(title))
    write_run(tmp_path, [{"step": 1, "kl/mean": 0.1, "critic/loss": 0.2, "time/train_seconds": 1.0}])
    write_report(tmp_path, "Three")
    assert titles == ["KL to the reference", "Critic loss", "Time per step"]


def test_run_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"run_dir={tmp_path}.*holds no step"):
        write_report(tmp_path, "Nothing")


def test_panels_and_summary_name_known_metrics_and_have_a_color_each() -> None:
    assert {key for panel in PANELS for key in panel.lines} | set(SUMMARY) <= set(METRICS)
    assert max(len(panel.lines) for panel in PANELS) <= len(COLORS)
