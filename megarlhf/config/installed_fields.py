"""The options that the installed vLLM and Megatron-Core have: fields of their dataclasses, read from the source.

Importing either takes many seconds; this parses a few of their files. Types are evaluated as Python would, with names
looked up in the module that imports them.
"""

import ast
import importlib.util
import inspect
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

DATACLASSES = {
    "vllm": (("vllm.engine.arg_utils", "EngineArgs"),),
    "megatron": (
        ("megatron.core.transformer.transformer_config", "TransformerConfig"),
        ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
    ),
}


class Settings:
    """In the place of a class of settings, which takes a dictionary."""


class Unwritable:
    """In the place of what no text can give: functions, dtypes, classes that are chosen."""

    def __class_getitem__(cls, item: Any) -> type["Unwritable"]:
        return cls


class InstalledField(NamedTuple):
    """One field of a dataclass."""

    owner: str  # its class, such as "OptimizerConfig"
    kind: Any  # its type
    default: str  # as the source has it; empty where it has none
    doc: str


@cache
def installed_fields(program: str) -> dict[str, InstalledField]:
    """By name, in the order of the source; none where the program is not installed.

    Args:
        program: "vllm" or "megatron".
    """
    fields: dict[str, InstalledField] = {}
    for module, name in DATACLASSES[program]:
        if (place := _find(module, name)) is not None:
            fields |= {name: f for name, f in _fields_of(*place).items() if name not in fields}
    return fields


def _source(module: str) -> Path | None:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root, *rest)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@cache
def _names(module: str) -> dict[str, ast.stmt]:
    """Classes, assignments and imports at the top of a module, and inside its `if` and `try`."""
    path = _source(module)
    found: dict[str, ast.stmt] = {}
    pending = list(ast.parse(path.read_text(encoding="utf-8")).body) if path is not None else []
    while pending:
        node = pending.pop()
        match node:
            case ast.If() | ast.Try():
                pending += node.body
            case ast.ClassDef():
                found[node.name] = node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = node
            case ast.ImportFrom():
                found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def _find(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """The module that defines a name, and where; None where it comes from another package."""
    node = _names(module).get(name)
    if not isinstance(node, ast.ImportFrom):
        return None if node is None else (module, node)
    path = _source(module)
    package = module if path is not None and path.name == "__init__.py" else module.rpartition(".")[0]
    origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    original = next(alias.name for alias in node.names if name in (alias.name, alias.asname))
    return _find(origin, original) if origin.split(".")[0] == module.split(".")[0] else None


class _Namespace(dict[str, Any]):
    """What the names in a module's annotations mean."""

    def __init__(self, module: str) -> None:
        super().__init__({name: getattr(typing, name) for name in typing.__all__} | {"Callable": Unwritable})
        super().update({kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple, set, object)})
        super().update(type=Unwritable)
        self.module = module

    def __missing__(self, name: str) -> Any:
        match _find(self.module, name):
            case (module, ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value)):
                return _evaluated(value, module)
            case (_, ast.ClassDef(bases=[ast.Name(id="IntEnum")])):
                return int
            case (_, ast.ClassDef() as node) if any("Enum" in ast.unparse(base) for base in node.bases):
                names = [part.targets[0] for part in node.body if isinstance(part, ast.Assign)]
                return typing.Literal[tuple(name.id for name in names if isinstance(name, ast.Name))]
            case (_, ast.ClassDef()):
                return Settings
        return Unwritable


def _evaluated(annotation: ast.expr, module: str) -> Any:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    expression = ast.fix_missing_locations(_WithoutModules().visit(annotation))
    try:
        return eval(compile(ast.Expression(expression), module, "eval"), {}, _Namespace(module))
    except (NameError, SyntaxError, TypeError):  # a type that is made by a call, or of a newer Python
        return Any


class _WithoutModules(ast.NodeTransformer):
    """`torch.dtype` is of another package."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Name(id=node.attr, ctx=ast.Load())


def _fields_of(module: str, node: ast.stmt) -> dict[str, InstalledField]:
    assert isinstance(node, ast.ClassDef)
    fields: dict[str, InstalledField] = {}
    for base in node.bases:
        if (place := _find(module, ast.unparse(base))) is not None:
            fields |= _fields_of(*place)
    for name, part, text in _declared(node):
        if not name.startswith("_"):
            doc = text or _text_of_default(module, part.value)
            default = ast.unparse(part.value) if part.value is not None else ""
            fields[name] = InstalledField(node.name, _evaluated(part.annotation, module), default, doc)
    return {name: field._replace(owner=node.name) for name, field in fields.items()}


def _declared(node: ast.ClassDef) -> Iterator[tuple[str, ast.AnnAssign, str]]:
    """The fields of a class, each with the text below it."""
    for part, following in zip(node.body, [*node.body[1:], None], strict=True):
        match part, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                yield name, part, inspect.cleandoc(text)
            case ast.AnnAssign(target=ast.Name(id=name)), _:
                yield name, part, ""


def _text_of_default(module: str, default: ast.expr | None) -> str:
    """vLLM's engine arguments take defaults and texts from its classes of settings: `ModelConfig.seed`."""
    match default:
        case (
            ast.Attribute(value=ast.Name(id=owner), attr=name)
            | ast.Call(args=[ast.Name(id=owner), ast.Constant(value=str() as name)])
        ):
            _, place = _find(module, owner) or ("", None)
            declared = _declared(place) if isinstance(place, ast.ClassDef) else ()
            return next((text for field, _, text in declared if field == name), "")
    return ""


def shown(kind: Any) -> str:
    """A type as help has it."""
    text = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    for name in ("typing.", f"{__name__}."):
        text = text.replace(name, "")
    return text.replace("NoneType", "None").replace("Settings", "dict").replace("Unwritable", "object")
