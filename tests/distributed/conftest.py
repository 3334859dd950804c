"""The matrix of measured differences, printed after the tests."""

import pytest

Matrix = list[str]
_MATRIX = pytest.StashKey[Matrix]()


@pytest.fixture(scope="session")
def matrix(request: pytest.FixtureRequest) -> Matrix:
    """Rows for the summary."""
    return request.config.stash.setdefault(_MATRIX, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_MATRIX, [])
    if rows:
        terminalreporter.section("largest differences to one process")
        for row in rows:
            terminalreporter.write_line(row)
