"""Options of vLLM and Megatron-Core that are passed through to them: `--vllm_NAME`, and Megatron's by their own names.

What they are called and take is read from the installed packages; what a contract of this package depends on is refused
with the reason.
"""

import difflib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from megarlhf.config.installed_fields import installed_fields, shown
from megarlhf.config.refused_options import refusal
from megarlhf.config.values import alternatives, as_text, value_of

PREFIXES = {"vllm": "vllm_", "megatron": ""}  # program -> what its flags begin with


@dataclass(frozen=True, kw_only=True)
class MegatronPassedArguments:
    """Options that Megatron-Core takes as they are: in YAML here by name, as flags each under its own name."""

    megatron: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Fields of Megatron-Core's TransformerConfig and OptimizerConfig, for every model that is trained."""


@dataclass(frozen=True, kw_only=True)
class VLLMPassedArguments:
    """Options that vLLM takes as they are: in YAML here by name, as flags --vllm_NAME."""

    vllm: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Fields of vLLM's EngineArgs; --vllm_NAME on the command line."""


@dataclass(frozen=True, kw_only=True)
class PassedArguments(VLLMPassedArguments, MegatronPassedArguments):
    """Options that Megatron-Core and vLLM take as they are: in YAML here by name, as flags each under its own name."""


def program_of(flag: str, offered: Sequence[str], *, only_switches: bool = False) -> str | None:
    """Whose option `flag` is, without dashes at its start and with _; None where no program that is offered has it."""
    for program in offered:
        prefix = PREFIXES[program]
        option = installed_fields(program).get(flag.removeprefix(prefix)) if flag.startswith(prefix) else None
        if option is not None and (bool in alternatives(option.kind) or not only_switches):
            return program
    return None


def read(program: str, name: str, texts: Sequence[str]) -> Any:
    """The value of a field from the texts after its flag.

    Raises:
        ValueError: it is refused, with the reason, or the texts are of another type.
    """
    if (reason := refusal(program, name)) is not None:
        raise ValueError(f"cannot be passed on; {reason}")
    kind = installed_fields(program)[name].kind
    return True if not texts and bool in alternatives(kind) else value_of(texts, kind)


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
        elif (option := PREFIXES[program] + name) in ours:
            errors.append(f"{name} of {program} is an option of this package: set {option} instead")
        else:
            try:
                taken[name] = read(program, name, [as_text(value)])
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
        default = [f"default: {entry.default}"] if entry.default else []
        lines = [f"not passed on: {reason}"] if reason else [*entry.doc.splitlines(), *default]
        flag = f"--{PREFIXES[program]}{name}".replace("_", "-")
        blocks.append("\n      ".join([f"  {flag}  {shown(entry.kind)}  ({entry.owner})", *lines]))
    return "\n".join(blocks) or f"{program} is not installed: its options are not known"
