"""How options are read as numbers: `int` and `float` alone would take "\u0663" and "1_0"."""

from __future__ import annotations

from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from unicl_fast.system.checked_fields import plain_number


def plain_numbers() -> ConstructorRegistry:
    """The registry of tyro in which numbers are read by `plain_number`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> Any:
        if info.type not in (int, float):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=info.type.__name__.upper(),
            instance_from_str=lambda words: plain_number(words[0], info.type),
            is_instance=lambda value: type(value) in {int, info.type},
            str_from_instance=lambda value: [str(value)],
        )

    return registry
