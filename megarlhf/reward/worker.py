"""The process that runs reward code: `python -m megarlhf.reward.worker`, one JSON object a line in and out.

Its arguments are the memory that it may have, in bytes, and whether it may use the network, 0 or 1. The first line says
what to load: {"function_path", "rule", "rule_pattern"}; the answer is {"ready": true, "separation"}, the fields of
separation.py's Separation. Each later line is a call {"responses", "stop_texts", "prompt_places", "prompts",
"labels"}: the first three are lists of one length, the last two have each prompt once, at the place that its responses
name. The answer is {"rewards", "reasons"} with one of each for a response, where a reward is null and has a reason if
there is no result. Instead of either answer {"error": reason} says that the code could not be loaded or that the whole
call failed. Every line has an "id", and its answer the same.
"""

import copy
import errno
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TextIO

from megarlhf.reward.separation import separate
from megarlhf.reward.user_function import Scores, load_function

_READ_BYTES = 1 << 20  # at once, of lines of megabytes


def main(memory_bytes: int, network: bool) -> None:
    """Serve calls until the input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))  # not of addresses: CUDA reserves terabytes
    separation = separate(network=network)
    if separation.kind != "namespaces":  # which end with the process that guards them
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    requests, replies = _take_pipes()
    settings = json.loads(requests.readline())
    number = settings.pop("id")
    try:
        score = _load(**settings)
    except (Exception, SystemExit) as error:
        _send(replies, {"id": number, "error": _describe(error)})
        return
    _send(replies, {"id": number, "ready": True, "separation": separation._asdict()})
    for line in requests:
        call = json.loads(line)
        number = call.pop("id")
        try:
            rewards, reasons = score(_per_response(**call))
        except (Exception, SystemExit) as error:
            _send(replies, {"id": number, "error": f"the reward raised {_describe(error)}"})
        else:
            _send(replies, {"id": number, "rewards": rewards, "reasons": reasons})


def _per_response(
    *, responses: list[str], stop_texts: list[str], prompt_places: list[int], prompts: list[str], labels: list[Any]
) -> dict[str, list[Any]]:
    """A call as lists of one length; no two responses share a label that reward code could change."""
    texts = [prompts[place] for place in prompt_places]
    return {
        "queries": [prompt + response for prompt, response in zip(texts, responses, strict=True)],
        "prompts": texts,
        "responses": responses,
        "stop_texts": stop_texts,
        "labels": [copy.deepcopy(labels[place]) for place in prompt_places],
    }


def _take_pipes() -> tuple[BinaryIO, TextIO]:
    """Keep the socket to the trainer to ourselves: reward code reads nothing, and what it prints goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb", _READ_BYTES), os.fdopen(os.dup(1), "w", encoding="utf-8")
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
    said = f"{type(error).__name__}: {error}"[:500]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"{said} (of the memory that reward_memory_gib gives it)"
        refused = isinstance(cause, PermissionError) and cause.filename is None  # Landlock's connect
        if isinstance(cause, socket.gaierror) or refused or getattr(cause, "errno", None) == errno.ENETUNREACH:
            return f"{said} (reward code has no network unless reward_network gives it)"
        cause = cause.__cause__ or cause.__context__
    return said


def _load(
    *, function_path: str | None, rule: str | None, rule_pattern: str | None
) -> Callable[[dict[str, list[Any]]], Scores]:
    if function_path is not None:
        return load_function(function_path)
    from megarlhf.reward import rules  # math-verify takes a second to import, which a reward function need not wait for

    judges: dict[str | None, Callable[[str, Any], float | None]] = {
        "math": rules.math_reward,
        "exact_match": rules.exact_match_reward,
        "format": lambda response, label: rules.format_reward(response, rule_pattern or ""),
    }

    def score(call: dict[str, list[Any]]) -> Scores:
        rewards = [
            judges[rule](_without(stop_text, response), _without(stop_text, label))  # it is no part of an answer
            for response, label, stop_text in zip(call["responses"], call["labels"], call["stop_texts"], strict=True)
        ]
        reasons = [
            f"reward_rule={rule} has no use for label {label!r:.100}" if reward is None else None
            for reward, label in zip(rewards, call["labels"], strict=True)
        ]
        return rewards, reasons

    return score


def _without(ending: str, value: Any) -> Any:
    """A text, or every text of a list, without an ending."""
    if isinstance(value, list):
        return [_without(ending, element) for element in value]
    return value.removesuffix(ending) if isinstance(value, str) else value


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "1")
