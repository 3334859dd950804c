"""The process that runs reward code: `python -m megarlhf.reward.worker`, one JSON object a line in and out.

The first line says what to load: {"function_path", "rule", "rule_pattern"}; the answer is {"ready": true}. Each later
line is a call {"queries", "prompts", "responses", "labels"}, all lists of one length; the answer is {"rewards",
"reasons"} of that length, where a reward is null and has a reason if there is no result. Instead of either answer
{"error": reason} says that the code could not be loaded or that the whole call failed.
"""

import importlib.util
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

# Rewards of a call, None where there is no result, and a reason for each None.
Scores = tuple[list[float | None], list[str | None]]
ScoreCall = Callable[[dict[str, list[Any]]], Scores]


def main() -> None:
    """Serve calls until the input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    requests, replies = _take_pipes()
    try:
        score = _load(**json.loads(requests.readline()))
    except (Exception, SystemExit) as error:
        _send(replies, {"error": _describe(error)})
        return
    _send(replies, {"ready": True})
    for line in requests:
        try:
            rewards, reasons = score(json.loads(line))
        except (Exception, SystemExit) as error:
            _send(replies, {"error": f"the reward raised {_describe(error)}"})
        else:
            _send(replies, {"rewards": rewards, "reasons": reasons})


def _take_pipes() -> tuple[TextIO, TextIO]:
    """Keep the pipes to the trainer to ourselves: reward code reads nothing, and what it prints goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # else a kill loses what was printed
    return requests, replies


def _end_with_parent(parent: int) -> None:
    """A trainer that is killed cannot close us, and reward code that hangs never sees the end of the input."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _load(*, function_path: str | None, rule: str | None, rule_pattern: str | None) -> ScoreCall:
    return _load_rule(rule, rule_pattern) if function_path is None else _load_function(function_path)


def _load_rule(rule: str | None, pattern: str | None) -> ScoreCall:
    from megarlhf.reward import rules  # math-verify takes a second to import, which a reward function need not wait for

    def score(call: dict[str, list[Any]]) -> Scores:
        rewards: list[float | None] = []
        for response, label in zip(call["responses"], call["labels"], strict=True):
            if rule == "math":
                rewards.append(rules.math_reward(response, label))
            elif rule == "exact_match":
                rewards.append(rules.exact_match_reward(response, label))
            else:
                assert rule == "format" and pattern is not None
                rewards.append(rules.format_reward(response, pattern))
        reasons = [
            f"reward_rule={rule} has no use for label {label!r:.100}" if reward is None else None
            for reward, label in zip(rewards, call["labels"], strict=True)
        ]
        return rewards, reasons

    return score


def _load_function(path: str) -> ScoreCall:
    """The `reward_func` of a Python file, which may import its neighbours."""
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location("megarlhf_user_reward", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, "reward_func", None)
    if not callable(function):
        raise AttributeError("the file defines no function reward_func(queries, prompts, labels)")

    def score(call: dict[str, list[Any]]) -> Scores:
        # By place and not by name: users name the parameters as they like.
        returned = function(call["queries"], call["prompts"], call["labels"])
        return _read_rewards(returned, len(call["queries"]))

    return score


def _read_rewards(returned: object, count: int) -> Scores:
    """Rewards from what a reward function returned: a list, tuple, array or tensor, or a dict with one as "rewards".

    Anything else, or another length, leaves the whole call without result: nothing says whose reward is whose.
    """
    values = returned.get("rewards") if isinstance(returned, Mapping) else returned
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        return [None] * count, [f"reward_func returned {returned!r:.100}, not a list of {count} rewards"] * count
    if len(values) != count:
        return [None] * count, [f"reward_func returned {len(values)} rewards for {count} samples"] * count
    rewards = [_as_number(value) for value in values]
    reasons = [
        f"reward_func returned {value!r:.100}, not a finite number" if reward is None else None
        for reward, value in zip(rewards, values, strict=True)
    ]
    return rewards, reasons


def _as_number(value: object) -> float | None:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]  # a scalar tensor
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


if __name__ == "__main__":
    main()
