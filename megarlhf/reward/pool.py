"""One process of reward code and the chunks of samples that it scores, whatever the code does."""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from megarlhf.data.types import Prompt, Sample
from megarlhf.reward.process import RewardProcess, WorkerLostError
from megarlhf.reward.separation import Separation
from megarlhf.reward.sources import Outcome

# Importing the reward code may load a model or a large library, which the limit of one call need not allow for.
LOAD_TIMEOUT_SECONDS = 120.0
# Single samples whose calls hang or kill the process one after the other; then the rest of the chunk is given up.
MAX_CONSECUTIVE_LOSSES = 3
_MAX_REASON = 1000  # characters


class TimeLimit:
    """Until when something may go on, for all threads that have a part in it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left; 0 or less where there are none."""
        return self._end - time.monotonic()

    def stop(self) -> None:
        """Leave no time."""
        self._end = -math.inf


class ChunkScores(NamedTuple):
    """What became of a chunk."""

    outcomes: list[Outcome]  # one a sample
    failure: str | None  # why the call with all of them failed
    given_up: bool  # calls with single samples hung or died one after the other


class PoolWorker:
    """A process that scores chunks of samples, one at a time, and is started again where that is lost.

    A reward function gets a chunk in one call. Where that raises, hangs or dies, it gets the samples one by one, which
    costs only the guilty their reward. A rule judges samples one by one from the start.
    """

    def __init__(self, process: RewardProcess, settings: dict[str, str | None], *, timeout_seconds: float) -> None:
        """Nothing runs before `load` or `score`.

        Args:
            process: not started yet.
            settings: what the process loads: function_path, rule and rule_pattern (worker.py).
            timeout_seconds: limit of one call, be it for a chunk or for a sample.
        """
        self.process = process
        self.separation: Separation | None = None  # once loaded
        self._settings = settings
        self._has_chunk_call = settings["function_path"] is not None
        self._timeout_seconds = timeout_seconds

    def load(self, limit: TimeLimit) -> str | None:
        """Start the process and load the code, unless that is done already; why it cannot be loaded, or None."""
        if self.process.is_running:
            return None
        try:
            self.process.start()
            seconds = min(LOAD_TIMEOUT_SECONDS, limit.remaining())
            reply = self.process.request(self._settings, timeout_seconds=seconds)
        except WorkerLostError as error:
            return f"loading it {error}"
        except OSError as error:  # no process, no memory
            return f"its process cannot be started ({error})"
        if reply.get("ready") is not True:
            self.process.kill()
            return str(reply.get("error"))[:_MAX_REASON]
        self.separation = Separation(**reply["separation"])
        return None

    def score(self, samples: Sequence[Sample], limit: TimeLimit) -> ChunkScores:
        """Reward or reason of each sample. A call has its own limit, and no more time than is left of `limit`."""
        failure = None
        if self._has_chunk_call and limit.remaining() > 0:
            try:
                return ChunkScores(self._call(samples, limit), None, False)
            except (WorkerLostError, _CallError) as error:
                failure = str(error)
        outcomes: list[Outcome] = []
        losses = 0
        for sample in samples:
            if losses == MAX_CONSECUTIVE_LOSSES:
                outcomes.append((None, f"not tried after {losses} calls in a row that hung or died"))
                continue
            if limit.remaining() <= 0:
                outcomes.append((None, _late(limit)))
                continue
            try:
                outcomes += self._call([sample], limit)
            except _CallError as error:
                outcomes.append((None, str(error)))
            except WorkerLostError as error:
                outcomes.append((None, f"the reward {error}" if limit.remaining() > 0 else _late(limit)))
                losses += 1
                continue
            losses = 0
        return ChunkScores(outcomes, failure, losses == MAX_CONSECUTIVE_LOSSES)

    def _call(self, samples: Sequence[Sample], limit: TimeLimit) -> list[Outcome]:
        reason = self.load(limit)
        if reason is not None:
            raise WorkerLostError(f"code cannot be loaded any more: {reason}")
        seconds = min(self._timeout_seconds, limit.remaining())
        reply = self.process.request(_message(samples), timeout_seconds=seconds)
        if isinstance(reply.get("error"), str):
            raise _CallError(reply["error"][:_MAX_REASON])
        outcomes = _outcomes(reply, len(samples))
        if outcomes is None:
            self.process.kill()
            raise WorkerLostError("wrote into the pipe of its process's answers (not the rewards of this call)")
        return outcomes


class _CallError(Exception):
    """The reward code raised."""


def chunks(samples: Sequence[Sample], *, size: int, max_size: int) -> Iterator[Sequence[Sample]]:
    """Runs of samples in order, of `size` or less, between prompts.

    A prompt's samples that follow each other are more than `size` in one chunk where they have to, and only cut where
    they are more than `max_size`.
    """
    start = end = 0
    for _, group in groupby(samples, key=lambda sample: sample.group_id):
        count = sum(1 for _ in group)
        if start < end and end + count - start > size:
            yield samples[start:end]
            start = end
        end += count
        while end - start > max_size:
            yield samples[start : start + max_size]
            start += max_size
    if start < end:
        yield samples[start:end]


def _message(samples: Sequence[Sample]) -> dict[str, Any]:
    """A call, as worker.py reads it: prompts and labels once, and for each response the place of its own."""
    places: dict[Prompt, int] = {}
    return {
        "prompt_places": [places.setdefault(sample.prompt, len(places)) for sample in samples],
        "prompts": [prompt.text for prompt in places],
        "labels": [prompt.label for prompt in places],
        "responses": [sample.response_text for sample in samples],
        "stop_texts": [sample.stop_text for sample in samples],
    }


def _late(limit: TimeLimit) -> str:
    return f"no result within the {limit.seconds:g} seconds for all samples: raise reward_timeout_seconds"


def _outcomes(reply: dict[str, Any], count: int) -> list[Outcome] | None:
    """Reward and reason of each sample, one of them None; None where the reply is anything else."""
    rewards, reasons = reply.get("rewards"), reply.get("reasons")
    if not (isinstance(rewards, list) and isinstance(reasons, list) and len(rewards) == len(reasons) == count):
        return None
    outcomes: list[Outcome] = []
    for reward, reason in zip(rewards, reasons, strict=True):
        if isinstance(reward, float) and math.isfinite(reward) and reason is None:
            outcomes.append((reward, None))
        elif reward is None and isinstance(reason, str):
            outcomes.append((None, reason[:_MAX_REASON]))
        else:
            return None
    return outcomes
