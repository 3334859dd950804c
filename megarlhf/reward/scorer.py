"""Rewards for samples, from reward code in a process of its own that may raise, hang or die."""

import logging
import math
import re
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megarlhf.data.types import Sample
from megarlhf.reward.process import RewardProcess, WorkerLostError

logger = logging.getLogger(__name__)

RULES = ("math", "exact_match", "format")
# Importing the reward code may load a model or a large library, which the limit of one call need not allow for.
LOAD_TIMEOUT_SECONDS = 120.0
# Calls that hang or kill the worker one after the other; then the rest of the batch is given up.
MAX_CONSECUTIVE_LOSSES = 3
# Scoring a batch one by one takes at most this many times the limit of a call, or this long for each sample, if that
# is more. Samples that were not tried by then have no result.
SINGLE_CALLS = 10
SECONDS_PER_SAMPLE = 0.1
_MAX_REASON = 1000  # characters

_Outcome = tuple[float | None, str | None]  # a sample's reward, or why it has none


class RewardScorer:
    """Scores samples by a built-in rule or by the user's `reward_func(queries, prompts, labels)`.

    The code runs in a separate process, so that a hang or a crash costs a reward and not the trainer. The process
    starts with `check` and again when it is needed after a loss; state that reward code keeps in memory does not
    survive that. Of this process's environment it sees PASSED_VARIABLES (process.py) and what is named, and of other
    processes nothing where the system allows that (separation.py). `close` ends it, as does the end of this process.

    A reward function gets the whole batch in one call. Where that raises, hangs or dies, it gets the samples one by
    one, which costs only the guilty their reward. A rule judges samples one by one from the start.
    """

    def __init__(
        self,
        *,
        function_path: str | None,
        rule: str | None,
        rule_pattern: str | None,
        timeout_seconds: float,
        passed_variables: Sequence[str] = (),
    ) -> None:
        """Check the settings; nothing is loaded before `check`.

        Args:
            function_path: Python file that defines `reward_func`; either this or `rule` is given.
            rule: one of RULES.
            rule_pattern: regular expression of the rule "format".
            timeout_seconds: limit of one call, be it for a batch or for a sample.
            passed_variables: environment variables that the code sees besides PASSED_VARIABLES.
        Raises:
            ValueError: settings that do not fit together.
        """
        _check_settings(function_path, rule, rule_pattern, timeout_seconds)
        self.last_failures: list[str] = []  # what went wrong in the last `score`; a sample's entry names its place
        self._settings = {"function_path": function_path, "rule": rule, "rule_pattern": rule_pattern}
        self._source = f"reward_function={function_path}" if rule is None else f"reward_rule={rule}"
        self._has_batch_call = function_path is not None
        self._timeout_seconds = timeout_seconds
        self._process = RewardProcess(passed_variables)
        self._has_said_separation = False
        weakref.finalize(self, self._process.kill)

    def check(self) -> None:
        """Start the process and load the reward code, unless that is done already.

        Raises:
            ValueError: the code cannot be loaded: the file cannot be imported or defines no `reward_func`.
        """
        reason = self._load()
        if reason is not None:
            raise ValueError(f"{self._source} cannot be loaded: {reason}")

    def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, in their order, with `reward` set; None where there is no result, whatever the reward code did.

        It takes no longer than two calls may, plus the limit of scoring one by one (SINGLE_CALLS, SECONDS_PER_SAMPLE)
        and of starting the process again.
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

    def _load(self) -> str | None:
        """See `check`; why the code cannot be loaded, None where it is."""
        if self._process.is_running:
            return None
        try:
            self._process.start()
            reply = self._process.request(self._settings, timeout_seconds=LOAD_TIMEOUT_SECONDS)
        except WorkerLostError as error:
            return f"loading it {error}"
        except OSError as error:  # no process, no memory
            return f"its process cannot be started ({error})"
        if reply.get("ready") is not True:
            self._process.kill()
            return str(reply.get("error"))[:_MAX_REASON]
        if not self._has_said_separation:
            self._has_said_separation = True
            _say_separation(str(reply.get("separation")), str(reply.get("separation_reason")))
        return None

    def _score_batch(self, samples: Sequence[Sample]) -> list[_Outcome] | None:
        """Reward and reason of each sample from one call; None where the call as a whole failed."""
        try:
            return self._call(samples)
        except (WorkerLostError, _CallError) as error:
            self.last_failures.append(f"batch of {len(samples)}: {error}")
            logger.warning("a batch of %d rewards failed, scoring one by one: %s", len(samples), error)
            return None

    def _score_singly(self, samples: Sequence[Sample]) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        losses = 0
        limit = max(SINGLE_CALLS * self._timeout_seconds, SECONDS_PER_SAMPLE * len(samples))
        deadline = time.monotonic() + limit
        for sample in samples:
            if losses == MAX_CONSECUTIVE_LOSSES:
                outcomes.append((None, f"not tried after {losses} calls in a row that hung or died"))
                continue
            if time.monotonic() > deadline:
                outcomes.append((None, f"not tried within the {limit:g} seconds that scoring one by one may take"))
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

    def _call(self, samples: Sequence[Sample]) -> list[_Outcome]:
        reason = self._load()
        if reason is not None:
            raise WorkerLostError(f"code cannot be loaded any more: {reason}")
        call = {
            "queries": [sample.prompt.text + sample.response_text for sample in samples],
            "prompts": [sample.prompt.text for sample in samples],
            "responses": [sample.response_text for sample in samples],
            "stop_texts": [sample.stop_text for sample in samples],
            "labels": [sample.prompt.label for sample in samples],
        }
        reply = self._process.request(call, timeout_seconds=self._timeout_seconds)
        if isinstance(reply.get("error"), str):
            raise _CallError(reply["error"][:_MAX_REASON])
        outcomes = _outcomes(reply, len(samples))
        if outcomes is None:
            self._process.kill()
            raise WorkerLostError("wrote into the pipe of its process's answers (not the rewards of this call)")
        return outcomes


class _CallError(Exception):
    """The reward code raised."""


def _outcomes(reply: dict[str, Any], count: int) -> list[_Outcome] | None:
    """Reward and reason of each sample, one of them None; None where the reply is anything else."""
    rewards, reasons = reply.get("rewards"), reply.get("reasons")
    if not (isinstance(rewards, list) and isinstance(reasons, list) and len(rewards) == len(reasons) == count):
        return None
    outcomes: list[_Outcome] = []
    for reward, reason in zip(rewards, reasons, strict=True):
        if isinstance(reward, float) and math.isfinite(reward) and reason is None:
            outcomes.append((reward, None))
        elif reward is None and isinstance(reason, str):
            outcomes.append((None, reason[:_MAX_REASON]))
        else:
            return None
    return outcomes


def _say_separation(kind: str, reason: str) -> None:
    if kind == "landlock":
        logger.warning(
            "reward code can see the names of this run's processes, though not their environment or memory: the system "
            "gives it no namespace of its own (%s); see docs/limits.md",
            reason,
        )
    elif kind != "namespaces":
        logger.warning(
            "reward code can read the environment and memory of this run's processes, as every program of this user "
            "can: the system keeps them apart in no way (%s); see docs/limits.md",
            reason,
        )


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
