"""Options that users pass on to a dataclass of Megatron-Core, as that takes them."""

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any


def passed_fields(config_class: type[Any], passed: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are fields of this class; names of an enumeration's members become the members."""
    found = {field.name: (passed[field.name], field.default) for field in fields(config_class) if field.name in passed}
    return {
        name: type(default)[value] if isinstance(default, Enum) and isinstance(value, str) else value
        for name, (value, default) in found.items()
    }
