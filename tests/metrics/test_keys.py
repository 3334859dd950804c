"""The table of metrics, its check and its documentation."""

import math
import re
from pathlib import Path

import pytest

from megarlhf.metrics.keys import METRICS, check_metrics, main, markdown_table


def test_every_metric_has_a_phase_a_meaning_and_a_unit() -> None:
    for key, meaning in METRICS.items():
        phase = "memory/ROLE|time/ROLE/PHASE|reward/SOURCE|precision/PHASE|[a-z]+"
        assert re.fullmatch(rf"({phase})/[a-z_0-9]+|eval/SET/KEY|eval/pass@K", key)
        assert re.fullmatch(r"[A-Z].+ \(.+\)", meaning), key


def test_documentation_is_in_step(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert Path(__file__).parents[2].joinpath("docs/metrics.md").read_text() == capsys.readouterr().out


def test_table_has_a_row_for_each_metric_and_two_columns_in_each() -> None:
    head, rule, *rows = markdown_table().splitlines()
    assert len(rows) == len(METRICS)
    for line in (head, rule, *rows):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_check_names_the_key(value: float) -> None:
    with pytest.raises(ValueError, match="reward/meen.*reward/mean"):
        check_metrics({"kl/mean": 0.5, "reward/meen": value})
    with pytest.raises(ValueError, match="eval/math/acuracy.*eval/accuracy"):
        check_metrics({"eval/math/accuracy": 0.5, "eval/my-set.2/pass@16": 0.5, "eval/math/acuracy": value})


def test_check_lets_known_metrics_pass_whatever_their_value() -> None:
    check_metrics({"reward/mean": -1.5, "sync/version": 3, "policy/ratio_mean": math.inf, "kl/mean": math.nan})
