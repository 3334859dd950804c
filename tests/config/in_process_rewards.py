"""What scores, and what serves scores, as far as a program talks to them."""

from collections.abc import Callable, Sequence
from typing import Any

from megarlhf.data.types import Rollout
from megarlhf.reward.remote import RemoteOptions
from megarlhf.reward.server import Limits
from megarlhf.reward.sources import SourceResult
from megarlhf.reward.texts import ModelTextScorer, Text, TextScorer
from tests.config.in_process import Trace


class FakeScorer:
    """Rewards that depend on prompt and response; some have none if a run asks for it by its rule's pattern."""

    name = "function"

    def __init__(self, trace: Trace, **options: Any) -> None:
        self._trace = trace
        trace.given["reward"].append(options)

    def check(self) -> None: ...

    def close(self) -> None: ...

    def score(self, rollout: Rollout) -> SourceResult:
        samples = rollout.samples
        self._trace.given["scored"].append(samples)
        lost = self._trace.given["reward"][0]["rule_pattern"]
        keep = 1.0 if lost is None else float(lost)  # part of the samples with a result
        rewards = [(sum(map(ord, s.response_text)) % 7 + s.prompt.index) / 4 for s in samples]
        lost_one = None, "lost"
        return SourceResult(
            outcomes=[(r, None) if i < keep * len(samples) else lost_one for i, r in enumerate(rewards)]
        )


class FakeRemote(FakeScorer):
    """A server that scores as the code does."""

    def __init__(self, trace: Trace, name: str, urls: Sequence[str], options: RemoteOptions) -> None:
        self.name, self._trace = name, trace
        trace.given["remote"].append({"name": name, "urls": list(urls)} | vars(options))


class FakeServer:
    """A server that a reward model scores one text for; it notes the rest."""

    def __init__(self, trace: Trace, scorer: TextScorer, limits: Limits, *, on_ready: Callable[[], None]) -> None:
        self._trace, self._scorer, self._on_ready = trace, scorer, on_ready
        trace.given["server"].append(vars(limits) | vars(scorer))

    def run(self, listening: Any, **tls: str | None) -> None:
        self._trace.given["listening"].append(listening.getsockname())
        self._trace.given["tls"].append(tls)
        self._on_ready()
        if isinstance(self._scorer, ModelTextScorer):
            self._scorer.open()
            texts = self._scorer.tokenize([Text(query="r 0", prompt=None, label=None, is_cut=False)])
            self._trace.given["outcomes"] += self._scorer.score(texts).outcomes
            self._scorer.close()
