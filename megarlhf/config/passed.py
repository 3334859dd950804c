"""Options of vLLM and Megatron-Core that are passed through to them: `--vllm_NAME`, and Megatron's by their own names.

What they are called and take is read from the installed packages; what a contract of this package depends on is refused
with the reason.
"""

import difflib
import json
import types
import typing
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
import yaml

from megarlhf.config.installed_fields import InstalledField, Settings, Unwritable, installed_fields, shown
from megarlhf.config.refused_options import refusal

PREFIXES = {"vllm": "vllm_", "megatron": ""}  # program -> what its flags begin with


@dataclass(frozen=True, kw_only=True)
class MegatronPassedArguments:
    """Options that Megatron-Core takes as they are: in YAML here by name, as flags each under its own name."""

    megatron: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Fields of Megatron-Core's TransformerConfig and OptimizerConfig, for every model that is trained."""


@dataclass(frozen=True, kw_only=True)
class PassedArguments(MegatronPassedArguments):
    """Options that Megatron-Core and vLLM take as they are: in YAML here by name, as flags each under its own name."""

    vllm: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Fields of vLLM's EngineArgs; --vllm_NAME on the command line."""


def program_of(flag: str, offered: Sequence[str]) -> str | None:
    """Whose option `flag` is, without dashes at its start and with _; None where no program that is offered has it."""
    for program in offered:
        prefix = PREFIXES[program]
        if flag.startswith(prefix) and flag.removeprefix(prefix) in installed_fields(program):
            return program
    return None


def is_switch(flag: str, program: str) -> bool:
    """Whether it may be written --no-flag."""
    kind = installed_fields(program)[flag.removeprefix(PREFIXES[program])].kind
    return bool in _alternatives(kind)


def read(program: str, name: str, texts: Sequence[str]) -> Any:
    """The value of a field from the texts after its flag.

    Raises:
        ValueError: it is refused, with the reason, or the texts are of another type.
    """
    reason = refusal(program, name)
    if reason is not None:
        raise ValueError(f"cannot be passed on; {reason}")
    kind = installed_fields(program)[name].kind
    if not texts and bool in _alternatives(kind):
        return True
    for alternative in sorted(_alternatives(kind), key=lambda kind: kind is str):  # text takes whatever is left
        if not texts:
            break
        try:
            return _converted(list(texts), alternative)
        except (ValueError, yaml.YAMLError):
            continue
    given = repr(" ".join(texts)) if texts else "no value"
    if all(alternative in (Unwritable, types.NoneType) for alternative in _alternatives(kind)):
        raise ValueError("takes an object, which no text can give")
    raise ValueError(f"takes {shown(kind)}, not {given}")


def checked(program: str, values: Any, ours: Container[str]) -> tuple[dict[str, Any], list[str]]:
    """The same for names and values of a YAML file; values, and what is wrong with the rest.

    Args:
        ours: names of this package's own options, which win over the program's.
    """
    if not isinstance(values, Mapping):
        return {}, [f"{program}={values!r} must hold names and values"]
    taken: dict[str, Any] = {}
    errors = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in installed_fields(program):
            near = difflib.get_close_matches(name, installed_fields(program), n=1)
            errors.append(f"unknown key {name} of {program}" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        if PREFIXES[program] + name in ours:
            errors.append(f"{name} of {program} is an option of this package: set {PREFIXES[program]}{name} instead")
            continue
        try:
            taken[name] = read(program, name, [value if isinstance(value, str) else json.dumps(value)])
        except ValueError as error:
            errors.append(f"{program}: {name}={value!r} {error}")
    return taken, errors


def nearest(flag: str, offered: Sequence[str]) -> list[str]:
    """The most similar flags of these programs, refused ones left out."""
    places = {
        f"{PREFIXES[program]}{name}": (program, name)
        for program in offered
        if flag.startswith(PREFIXES[program])
        for name in installed_fields(program)
    }
    near = difflib.get_close_matches(flag, places, n=5)
    return [found for found in near if refusal(*places[found]) is None][:1]


def help_text(program: str) -> str:
    """Every field with its type, default and text; those that are refused with the reason."""
    blocks = []
    for name, entry in installed_fields(program).items():
        reason = refusal(program, name)
        lines = [f"not passed on: {reason}"] if reason else _described(entry)
        flag = f"--{PREFIXES[program]}{name}".replace("_", "-")
        blocks.append("\n      ".join([f"  {flag}  {shown(entry.kind)}  ({entry.owner})", *lines]))
    return "\n".join(blocks) or f"{program} is not installed: its options are not known"


def _described(entry: InstalledField) -> list[str]:
    default = [f"default: {entry.default}"] if entry.default else []
    return [*entry.doc.splitlines(), *default]


def _alternatives(kind: Any) -> list[Any]:
    """The members of a union, nested ones too."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return [part for member in get_args(kind) for part in _alternatives(member)]
    return [kind]


def _converted(texts: list[str], kind: Any) -> Any:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if kind is Any and len(texts) == 1:
        return yaml.safe_load(texts[0])
    if origin in (list, set, tuple):
        return _converted_items(texts, parts[0] if parts else Any)
    if len(texts) != 1:
        raise ValueError
    (text,) = texts
    if origin is Literal:
        return next(choice for choice in parts if str(choice) == text) if text in map(str, parts) else _fail()
    if kind in (bool, types.NoneType):
        return {"true": True, "false": False, "none": None, "null": None}[_one_of(text.lower(), kind)]
    if kind in (int, float, str):
        return kind(text)
    value = yaml.safe_load(text) if origin in (dict, Settings) else None
    return value if isinstance(value, dict) else _fail()


def _one_of(text: str, kind: type) -> str:
    return text if text in (("true", "false") if kind is bool else ("none", "null")) else _fail()


def _converted_items(texts: list[str], kind: Any) -> list[Any]:
    if len(texts) == 1 and texts[0].startswith("["):
        items = yaml.safe_load(texts[0])
        texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
    found = []
    for text in texts:
        for alternative in sorted(_alternatives(kind), key=lambda kind: kind is str):
            try:
                found.append(_converted([text], alternative))
                break
            except ValueError:
                continue
        else:
            _fail()
    return found


def _fail() -> typing.NoReturn:
    raise ValueError
