"""How options are read: as numbers, since `int` takes "\u0663" and "1_0", and as a data set."""

import shlex
from typing import Annotated, Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from unicl_fast.system.checked_fields import plain_number


def _one_data_set(words: list[str]) -> str:
    if len(words) > 1:
        command = f"unicl-pack build {shlex.join(words)} --out DIR"
        raise ValueError(f"one data set is taken, not {len(words)}: {command} makes one of them")
    if not words:
        raise ValueError("name a data set")
    return words[0]


OneDataSet = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs="*", metavar="DIR", instance_from_str=_one_data_set,
        is_instance=lambda value: isinstance(value, str), str_from_instance=lambda value: [value],
    ),
]  # fmt: skip


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
