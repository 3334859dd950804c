"""From the command line and YAML to a configuration, and back to a dictionary and YAML.

Flags are flat and accept `-` and `_` alike. `--config FILE.yaml` gives values that flags override. OpenRLHF's spellings
are understood (aliases.py), and every unknown, refused or missing option is reported in one go. tyro prints `--help`.
"""

import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

import tyro
import yaml

from megarlhf.config import passed
from megarlhf.config.aliases import ALIASES, SWITCH_VALUES, Alias
from megarlhf.config.values import alternatives, as_text, value_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")
_USAGE = """\
  --config FILE.yaml  read options from a file, by flat names or by group; flags win over it
  --dry-run           make every check of a run, print the configuration and the plan, and stop

Names may be written with - or _. OpenRLHF 0.5's flags are understood, or refused with the reason.
Options of Megatron-Core, and of vLLM as --vllm_NAME, are passed on to them: --help megatron, --help vllm."""


class Option(NamedTuple):
    """One field of a configuration's groups."""

    group: str  # attribute of the configuration that holds it
    annotation: Any  # its type
    required: bool  # it has no default

    @property
    def is_switch(self) -> bool:
        """A bool, or a bool that may be None or come several times."""
        return not {bool, tuple[bool, ...]}.isdisjoint(alternatives(self.annotation))

    def value(self, texts: Sequence[str]) -> Any:
        """The value that texts give; ValueError where they are of another type."""
        found = value_of(texts, self.annotation)
        return tuple(found) if isinstance(found, list) else found


def options_of(config_class: type[ConfigT]) -> dict[str, Option]:
    """Every field of every group by its flat name, in the order of the declarations."""
    options: dict[str, Option] = {}
    for group, group_class in _groups(config_class).items():
        hints = get_type_hints(group_class)
        for f in dataclasses.fields(group_class):
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            options[f.name] = Option(group, hints[f.name], required)
    return options


def _groups(config_class: type[ConfigT]) -> dict[str, Any]:
    """The classes of a configuration's groups by their attributes."""
    hints = get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class)}


def parse(config_class: type[ConfigT], argv: Sequence[str], prog: str) -> tuple[ConfigT, bool]:
    """Configuration from the arguments (without the program's name), and whether `--dry-run` was given.

    Notes about accepted flags without effect go to stderr.

    Raises:
        SystemExit: code 2 after a message on stderr, where a flag or a YAML key is unknown, refused or has a bad value;
            code 0 after `--help`.
    """
    options = options_of(config_class)
    line = _read_flags(argv, options)
    values, errors = ({}, []) if line.config_file is None else _read_yaml(config_class, line.config_file)
    passed_on = {program: values.get(program, {}) | given for program, given in line.passed.items()}
    values |= line.values | passed_on
    if line.help_of is not None:
        print(passed.help_text(line.help_of))
        raise SystemExit(0)
    if line.help:
        tyro.cli(
            config_class,
            prog=prog,
            description=f"{config_class.__doc__}\n\n{_USAGE}",
            args=["--help"],
            default=_build(config_class, values, absent=tyro.MISSING),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    if errors := line.errors + errors or _missing(options, values):
        for error in errors:
            print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2)
    if os.environ.get("RANK", "0") == "0" and "MEGARLHF_RENDEZVOUS" not in os.environ:  # ranks' parent has said it
        for note in line.notes:
            print(f"{prog}: note: {note}", file=sys.stderr)
    if line.wandb_key is not None:
        os.environ["WANDB_API_KEY"] = line.wandb_key  # where wandb looks for it, here and in the ranks
    return _build(config_class, values, absent=None), line.dry_run


def to_dict(config: "DataclassInstance") -> dict[str, Any]:
    """Flat dictionary of all values by field name."""
    return {name: getattr(getattr(config, o.group), name) for name, o in options_of(type(config)).items()}


def to_yaml(config: "DataclassInstance") -> str:
    """YAML text of all values by group, which `--config` reads back."""
    groups: dict[str, dict[str, Any]] = {}
    for name, option in options_of(type(config)).items():
        value = getattr(getattr(config, option.group), name)
        groups.setdefault(option.group, {})[name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(groups, sort_keys=False, allow_unicode=True)


def from_dict(config_class: type[ConfigT], mapping: Mapping[str, Any]) -> ConfigT:
    """Configuration from flat or grouped values; fields that are absent take their defaults.

    Raises:
        ValueError: keys that are unknown or missing and values of another type, all of them, one a line.
    """
    values, errors = _checked_values(config_class, mapping)
    if errors := errors + _missing(options_of(config_class), values):
        raise ValueError("\n".join(errors))
    return _build(config_class, values, absent=None)


def config_of(config_class: type[ConfigT], config: "DataclassInstance", **values: Any) -> ConfigT:
    """Configuration with what another one has under the same names, and with `values`; the rest are its defaults."""
    options = options_of(config_class)
    assert values.keys() <= options.keys(), f"{config_class.__name__} has no {values.keys() - options.keys()}"
    found = {name: value for name, value in to_dict(config).items() if name in options} | values
    return _build(config_class, found, absent=None)


def _missing(options: Mapping[str, Option], values: Mapping[str, Any]) -> list[str]:
    absent = [name for name, option in options.items() if option.required and name not in values]
    return [f"{name} is missing; it has no default: set it" for name in absent]


def _nearest(name: str, options: Mapping[str, Option], prefix: str = "") -> str:
    """The rest of a message about an unknown name: the likeliest meant; ours, then OpenRLHF's, then those passed on."""
    aliases = [alias for alias, meant in ALIASES.items() if meant.needs <= options.keys()]
    ours = difflib.get_close_matches(name, list(options), n=1) or difflib.get_close_matches(name, aliases, n=1)
    theirs = passed.nearest(name, _programs(options))
    found = difflib.get_close_matches(name, [*ours, *theirs], n=1)
    return f"did you mean {prefix}{found[0]}?" if found else "see --help for the ones there are"


def _programs(options: Mapping[str, Option]) -> list[str]:
    """The programs whose options a configuration passes on."""
    return [program for program in passed.PREFIXES if program in options]


@dataclasses.dataclass
class _Line:
    """What stands on a command line."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # by field; the last flag wins
    config_file: str | None = None
    dry_run: bool = False
    help: bool = False
    help_of: str | None = None  # the program whose options are asked for
    wandb_key: str | None = None
    passed: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # program -> its field -> value
    notes: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)


def _read_flags(argv: Sequence[str], options: Mapping[str, Option]) -> _Line:
    line = _Line()
    for flag, texts in flags_and_values(argv, line.errors):
        name = flag.lstrip("-").replace("-", "_")
        positive = name.removeprefix("no_")
        if flag == "--help" and len(texts) == 1 and texts[0] in _programs(options):
            line.help_of = texts[0]
        elif flag in ("-h", "--help"):
            line.help = True
        elif name == "dry_run" and not texts:
            line.dry_run = True
        elif name == "config" and len(texts) == 1:
            line.config_file = texts[0]
        elif name in ("dry_run", "config"):
            line.errors.append(f"{flag} takes {'no value' if name == 'dry_run' else 'one value, a YAML file'}")
        elif name in options and name not in passed.PREFIXES:
            _take(line, flag, name, texts, options)
        elif positive != name and positive in options and options[positive].is_switch:
            _take(line, flag, positive, [*texts, "False"], options)
        elif name in ALIASES and ALIASES[name].needs <= options.keys():
            _take_alias(line, flag, name, texts, options)
        elif not _take_passed(line, flag, name, texts, _programs(options)):
            line.errors.append(f"unknown option {flag}; {_nearest(name, options, prefix='--')}")
    return line


def flags_and_values(argv: Sequence[str], errors: list[str]) -> list[tuple[str, list[str]]]:
    """Flags with the texts that follow them: `--a=1 --b 2 3` is [("--a", ["1"]), ("--b", ["2", "3"])]."""
    found: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            flag, equals, text = token.partition("=")
            found.append((flag, [text] if equals else []))
        elif token == "-h":
            found.append((token, []))
        elif found:
            found[-1][1].append(token)
        else:
            errors.append(f"{token} stands before any option; every argument is --name value")
    return found


def _take(line: _Line, flag: str, name: str, texts: list[str], options: Mapping[str, Option]) -> None:
    option = options[name]
    try:
        line.values[name] = option.value(texts or ["True"] if option.is_switch else texts)
    except ValueError as error:
        if name in SWITCH_VALUES and len(texts) == 1:
            line.values[name] = True
            line.notes.append(f"{flag}: {SWITCH_VALUES[name]}")
            line.wandb_key = texts[0] if name == "use_wandb" else line.wandb_key
            return
        hint = f"is a switch and takes no such value; write {flag} or --no_{name}"
        line.errors.append(f"{flag} {hint if option.is_switch else error}")


def _take_alias(line: _Line, flag: str, name: str, texts: list[str], options: Mapping[str, Option]) -> None:
    alias = ALIASES[name]
    num_values = len(alias.fields) + alias.num_ignored_values + bool(alias.choices)
    if alias.refused:
        line.errors.append(f"{flag} is not an option here; {alias.refused}")
    elif len(texts) != num_values:
        line.errors.append(f"{flag} takes {num_values} value(s), not {len(texts)}")
    else:
        if alias.choices and texts[0] not in alias.choices:
            why = f" ({alias.note})" if alias.note else ""
            line.errors.append(f"{flag} {texts[0]} is not known here{why}; it is one of {', '.join(alias.choices)}")
            return
        given = dict(zip(alias.fields, texts, strict=False))  # ignored values have no field
        for field_name, text in (given | alias.settings | alias.choices.get("".join(texts), {})).items():
            _take(line, flag, field_name, [alias.replace.get(text, text)], options)
        if alias.note:
            line.notes.append(f"{flag}: {alias.note}")


def _take_passed(line: _Line, flag: str, name: str, texts: list[str], programs: Sequence[str]) -> bool:
    """Take an option of another program; False where none has it."""
    program = passed.program_of(name, programs)
    if program is None and name.startswith("no_"):
        name, texts = name.removeprefix("no_"), [*texts, "False"]
        program = passed.program_of(name, programs, only_switches=True)
    if program is None:
        return False
    field_name = name.removeprefix(passed.PREFIXES[program])
    try:
        line.passed.setdefault(program, {})[field_name] = passed.read(program, field_name, texts)
    except ValueError as error:
        line.errors.append(f"{flag} {error}")
    return True


def _read_yaml(config_class: type[ConfigT], path: str) -> tuple[dict[str, Any], list[str]]:
    try:
        mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [f"config={path} cannot be read as YAML: {error}"]
    if not isinstance(mapping, dict):
        return {}, [f"config={path} must hold keys and values, one option a line: name: value"]
    values, errors = _checked_values(config_class, mapping)
    return values, [f"{path}: {error}" for error in errors]


def _checked_values(config_class: type[ConfigT], mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Flat values of the fields' types from flat or grouped ones, and what is wrong with the rest."""
    options = options_of(config_class)
    groups = {option.group for option in options.values()}
    pairs: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        pairs.extend(value.items() if key in groups and isinstance(value, Mapping) else [(key, value)])
    values: dict[str, Any] = {}
    errors: list[str] = []
    for key, value in pairs:
        name = str(key).replace("-", "_")
        if name in values:
            errors.append(f"{name} is given twice; keep one")
        elif name in options and name in passed.PREFIXES:
            values[name], found = passed.checked(name, value, options)
            errors += found
        elif name in options:
            try:
                values[name] = options[name].value([as_text(value)])
            except ValueError as error:
                errors.append(f"{name}={value!r} {error}")
        else:
            errors.append(f"unknown key {name}; {_meant(name, options)}")
    return values, errors


def _meant(name: str, options: Mapping[str, Option]) -> str:
    """What to write in YAML for an unknown key: only flags may carry OpenRLHF's names."""
    alias = ALIASES.get(name, Alias())
    ours = [*alias.fields, *(f"{field_name}: {text}" for field_name, text in alias.settings.items())]
    return f"write {', '.join(ours)}" if ours else alias.refused or alias.note or _nearest(name, options)


def _build(config_class: type[ConfigT], values: Mapping[str, Any], *, absent: Any) -> ConfigT:
    """Configuration of the given values, with `absent` in the place of required ones that are not among them."""
    arguments: dict[str, dict[str, Any]] = {}
    for name, option in options_of(config_class).items():
        group = arguments.setdefault(option.group, {})
        if name in values or option.required:
            group[name] = values.get(name, absent)
    classes = _groups(config_class)
    return config_class(**{group: classes[group](**given) for group, given in arguments.items()})
