"""What a program's exit status says: 2 of what was given, 1 of the run."""

import pytest

from megarlhf.cli.errors import report_errors, running


def test_a_value_error_of_a_started_run_is_no_mistake_in_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        with running():
            return int("seven")

    assert report_errors("megarlhf ppo", run) == 1
    said = capsys.readouterr().err
    assert said.startswith("megarlhf ppo: stopped: RunError: ValueError: invalid literal for int()")


def test_a_value_error_before_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors("megarlhf ppo", lambda: int("seven")) == 2
    assert capsys.readouterr().err.startswith("megarlhf ppo: error: invalid literal for int()")
