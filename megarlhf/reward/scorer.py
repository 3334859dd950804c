"""Rewards for samples, from reward code in a process of its own that may raise, hang or die."""

import logging
import re
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megarlhf.data.types import Sample
from megarlhf.reward.process import RewardProcess, WorkerLostError

logger = logging.getLogger(__name__)

RULES = ("math", "exact_match", "format")
# Importing the reward code may load a model or a large library, which the limit of one call need not allow for.
LOAD_TIMEOUT_SECONDS = 120.0
# Calls that hang or kill the worker one after the other; then the rest of the batch is given up.
MAX_CONSECUTIVE_LOSSES = 3


class RewardScorer:
    """Scores samples by a built-in rule or by the user's `reward_func(queries, prompts, labels)`.

    The code runs in a separate process, so that a hang or a crash costs a reward and not the trainer. The process
    starts at construction and again when it is needed after a loss; state that reward code keeps in memory does not
    survive that. It does not see environment variables that look like secrets: code that calls a service reads its key
    from a file. `close` ends it, as does the end of this process.

    A reward function gets the whole batch in one call. Where that raises, hangs or dies, it gets the samples one by
    one, which costs only the guilty their reward. A rule judges samples one by one from the start.
    """

    def __init__(
        self, *, function_path: str | None, rule: str | None, rule_pattern: str | None, timeout_seconds: float
    ) -> None:
        """Check the settings and load the reward code once.

        Args:
            function_path: Python file that defines `reward_func`; either this or `rule` is given.
            rule: one of RULES.
            rule_pattern: regular expression of the rule "format".
            timeout_seconds: limit of one call, be it for a batch or for a sample.
        Raises:
            ValueError: settings that do not fit together, or code that cannot be loaded.
        """
        _check_settings(function_path, rule, rule_pattern, timeout_seconds)
        self.last_failures: list[str] = []  # what went wrong in the last `score`; a sample's entry names its place
        self._settings = {"function_path": function_path, "rule": rule, "rule_pattern": rule_pattern}
        self._source = f"reward_function={function_path}" if rule is None else f"reward_rule={rule}"
        self._has_batch_call = function_path is not None
        self._timeout_seconds = timeout_seconds
        self._process = RewardProcess()
        weakref.finalize(self, self._process.kill)
        self.check()

    def check(self) -> None:
        """Start the process and load the reward code, unless that is done already.

        Raises:
            ValueError: the file cannot be imported or defines no `reward_func`.
        """
        if self._process.is_running:
            return
        self._process.start()
        try:
            reply = self._process.request(self._settings, timeout_seconds=LOAD_TIMEOUT_SECONDS)
        except WorkerLostError as error:
            reply = {"error": f"loading it {error}"}
        if "error" in reply:
            self._process.kill()
            raise ValueError(f"{self._source} cannot be loaded: {reply['error']}")

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, in their order, with `reward` set; None where there is no result.

        Raises:
            ValueError: the process had to be started again and the reward code cannot be loaded any more.
        """
        self.last_failures = []
        if not samples:
            return []
        outcomes = self._score_batch(samples) if self._has_batch_call else None
        if outcomes is None:
            outcomes = self._score_singly(samples)
        reasons = [reason for _, reason in outcomes if reason is not None]
        self.last_failures += [f"sample {i}: {reason}" for i, (_, reason) in enumerate(outcomes) if reason is not None]
        if reasons:
            listed = "; ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(3))
            logger.warning("%d of %d samples have no reward: %s", len(reasons), len(samples), listed)
        return [replace(sample, reward=reward) for sample, (reward, _) in zip(samples, outcomes, strict=True)]

    def close(self) -> None:
        """End the process and what it started. Scoring again starts another."""
        self._process.kill()

    def _score_batch(self, samples: Sequence[Sample]) -> list[tuple[float | None, str | None]] | None:
        """Reward and reason of each sample from one call; None where the call as a whole failed."""
        try:
            return self._call(samples)
        except (WorkerLostError, _CallError) as error:
            self.last_failures.append(f"batch of {len(samples)}: {error}")
            logger.warning("a batch of %d rewards failed, scoring one by one: %s", len(samples), error)
            return None

    def _score_singly(self, samples: Sequence[Sample]) -> list[tuple[float | None, str | None]]:
        outcomes: list[tuple[float | None, str | None]] = []
        losses = 0
        for sample in samples:
            if losses == MAX_CONSECUTIVE_LOSSES:
                outcomes.append((None, f"not tried after {losses} calls in a row that hung or died"))
                continue
            try:
                outcomes += self._call([sample])
            except _CallError as error:
                outcomes.append((None, str(error)))
            except WorkerLostError as error:
                outcomes.append((None, f"the reward {error}"))
                losses += 1
                continue
            losses = 0
        return outcomes

    def _call(self, samples: Sequence[Sample]) -> list[tuple[float | None, str | None]]:
        self.check()
        call = {
            "queries": [sample.prompt.text + sample.response_text for sample in samples],
            "prompts": [sample.prompt.text for sample in samples],
            "responses": [sample.response_text for sample in samples],
            "labels": [sample.prompt.label for sample in samples],
        }
        reply = self._process.request(call, timeout_seconds=self._timeout_seconds)
        if "error" in reply:
            raise _CallError(reply["error"])
        return list(zip(reply["rewards"], reply["reasons"], strict=True))


class _CallError(Exception):
    """The reward code raised."""


def _check_settings(
    function_path: str | None, rule: str | None, rule_pattern: str | None, timeout_seconds: float
) -> None:
    if (function_path is None) == (rule is None):
        raise ValueError(
            f"reward_function={function_path}, reward_rule={rule}; rewards have one source: set exactly one"
        )
    if function_path is not None and not (function_path.endswith(".py") and Path(function_path).is_file()):
        raise ValueError(f"reward_function={function_path} is not a Python file that exists")
    if rule is not None and rule not in RULES:
        raise ValueError(f"reward_rule={rule} is not one of {', '.join(RULES)}")
    if (rule == "format") != (rule_pattern is not None):
        raise ValueError(
            f"reward_rule={rule}, reward_format={rule_pattern}; the rule format, and no other, needs a pattern"
        )
    if rule_pattern is not None:
        try:
            re.compile(rule_pattern)
        except re.error as error:
            raise ValueError(f"reward_format={rule_pattern!r} is not a regular expression: {error}") from error
    if not timeout_seconds > 0:
        raise ValueError(f"reward_timeout_seconds={timeout_seconds}; a call needs more than 0 seconds")
