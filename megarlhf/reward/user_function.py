"""The user's reward function: found in its file, called, and what it returns read."""

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

# Rewards of a call, None where there is no result, and a reason for each None.
Scores = tuple[list[float | None], list[str | None]]
_ARGUMENTS = ("queries", "prompts", "labels")


def load_function(path: str) -> Callable[[dict[str, list[Any]]], Scores]:
    """The `reward_func` of a Python file, as a function of a call's lists.

    Raises:
        Exception: whatever the file raises; AttributeError or TypeError where its reward_func is missing or takes other
            arguments.
    """
    function = getattr(_import_file(Path(path).resolve()), "reward_func", None)
    if not callable(function):
        raise AttributeError(f"the file defines no function reward_func({', '.join(_ARGUMENTS)})")
    by_name = _takes_names(function)

    def score(call: dict[str, list[Any]]) -> Scores:
        arguments = {name: call[name] for name in _ARGUMENTS}
        returned = function(**arguments) if by_name else function(*arguments.values())
        if inspect.isawaitable(returned):
            returned = asyncio.run(_wait_for(returned))
        return _read_rewards(returned, len(call["queries"]))

    return score


def _import_file(path: Path) -> ModuleType:
    """The module in a file, which may import its neighbours, and relatively where it is part of a package."""
    folder, package = path.parent, list[str]()
    while (folder / "__init__.py").is_file():
        package.insert(0, folder.name)
        folder = folder.parent
    sys.path[:0] = dict.fromkeys([str(path.parent), str(folder)])
    if package:
        importlib.import_module(".".join(package))
    # Under its own name another process, as of multiprocessing's spawn, finds it again.
    name = ".".join([*package, path.stem])
    if not path.stem.isidentifier() or name in sys.modules or name in sys.stdlib_module_names:
        name = ".".join([*package, "megarlhf_user_reward"])
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _takes_names(function: Callable[..., Any]) -> bool:
    """Whether the arguments go by name. By place is the rule: users name the parameters as they like."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return False
    for by_name in (False, True):
        try:
            signature.bind(*() if by_name else _ARGUMENTS, **dict.fromkeys(_ARGUMENTS) if by_name else {})
        except TypeError:
            continue
        return by_name
    raise TypeError(f"reward_func{signature} cannot be called with ({', '.join(_ARGUMENTS)})")


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable


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
