"""What the tests of rewards share."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megarlhf.reward.scorer import RewardScorer
from tests.reward.samples import MakeScorer


@pytest.fixture
def make_scorer(tmp_path: Path) -> Iterator[MakeScorer]:
    """Scorer for the text of a reward file, closed at the end."""
    made = []

    def make(
        text: str,
        timeout_seconds: float = 20.0,
        passed_variables: Sequence[str] = (),
        num_workers: int = 1,
        chunk_size: int = 1024,
        memory_bytes: int | None = None,
        network: bool = False,
    ) -> RewardScorer:
        path = tmp_path / "my_reward.py"
        path.write_text(text)
        made.append(
            RewardScorer(
                function_path=str(path),
                rule=None,
                rule_pattern=None,
                timeout_seconds=timeout_seconds,
                num_workers=num_workers,
                chunk_size=chunk_size,
                passed_variables=passed_variables,
                memory_bytes=memory_bytes,
                network=network,
            )
        )
        made[-1].check()
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()
