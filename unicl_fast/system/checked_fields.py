"""Dataclasses checked by msgspec against their fields' types: `Annotated[int, Meta(ge=1, le=9)]`.

The messages are our own. (With pydantic, importing the config took 100 ms of CPU, not 30.)
"""

import dataclasses
import functools
import sys
import types
import typing
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from unicl_fast.system.wording import shorten

T = TypeVar("T")
N = TypeVar("N", int, float)

MOST_CHARACTERS = 10_000
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = sys.float_info.max  # msgspec has no infinite bounds; NaN is outside of any

Count = Annotated[int, Meta(ge=0, le=LARGEST_INT)]
Checksum = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z", description="16 hexadecimal digits")]
Fraction = Annotated[float, Meta(ge=0, le=1)]
PositiveFraction = Annotated[float, Meta(gt=0, le=1)]
NonNegative = Annotated[float, Meta(ge=0, le=LARGEST_FLOAT)]
Positive = Annotated[float, Meta(gt=0, le=LARGEST_FLOAT)]


def require(condition: bool, message: str) -> None:
    """Raises ValueError unless a condition between fields holds."""
    if not condition:
        raise ValueError(message)


def plain_number(text: str, kind: type[N]) -> N:
    """Reads a number of ASCII characters without "_"; ValueError for any other text."""
    require(text.isascii() and "_" not in text, f"no number: {shorten(text)}")
    return kind(text)


def plain_value(text: str, kind: Any, *, name: str) -> Any:
    """Reads an int, a float, or LOW..HIGH for a pair of floats (also an optional one).

    Raises ValueError: another text; says what `name` must be.
    """
    expected = "a whole number" if kind is int else "a number"
    try:
        if tuple[float, float] in (kind, *typing.get_args(kind)):
            expected = "a range LOW..HIGH"
            low, high = text.split("..")
            return plain_number(low, float), plain_number(high, float)
        return plain_number(text, int if kind is int else float)
    except ValueError as error:
        raise ValueError(f"{name} must be {expected}, not {text!r}") from error


def check_fields(instance: object, *, name: str = "") -> None:
    """Raises ValueError if a value does not fit its field's type; called by `__post_init__`."""
    for field, kind in _field_types(type(instance)).items():  # type: ignore[arg-type]
        convert(getattr(instance, field), kind, name=_dotted(name, field))


def from_json_values(cls: type[T], values: Any, *, name: str = "") -> T:
    """Builds a dataclass, and nested ones, from JSON values; messages call the object `name`.

    Raises ValueError: a field is unknown, of another type or out of range, or has no default and is
    missing.
    """
    types_of = _field_types(cls)  # type: ignore[arg-type]  # mypy: a type is not Hashable
    _refuse_unknown(values, types_of, name=name)
    missing = {
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if (field.default, field.default_factory) == (dataclasses.MISSING, dataclasses.MISSING)
    } - values.keys()
    if missing:
        raise ValueError(f"{_dotted(name, min(missing))} is missing")
    return cls(
        **{
            field: convert(value, types_of[field], name=_dotted(name, field))
            for field, value in values.items()
        }
    )


def with_values(instance: T, values: Any, *, name: str = "") -> T:
    """Returns a copy of a dataclass with some fields, also of nested dataclasses, replaced.

    Raises as `from_json_values`, but does not run `__post_init__`: other fields may follow.
    """
    cls: type[Any] = type(instance)
    if hasattr(cls, "class_for") and cls.class_for(values) is not cls:
        cls = cls.class_for(values)
        instance = cls()  # another class, and its defaults
    types_of = _field_types(cls)  # type: ignore[arg-type]
    _refuse_unknown(values, types_of, name=name)
    changed: T = object.__new__(cls)
    for field, kind in types_of.items():
        value = getattr(instance, field)
        if field in values:
            given, dotted = values[field], _dotted(name, field)
            if dataclasses.is_dataclass(value):
                value = with_values(value, given, name=dotted)
            else:
                value = convert(given, kind, name=dotted)
        object.__setattr__(changed, field, value)
    return changed


def convert(value: Any, kind: Any, *, name: str) -> Any:
    """Returns a value as the type `kind`, lists as tuples; raises ValueError if it does not fit."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if types.NoneType in inner and value is not None:  # `... | None`
        return convert(value, inner[0], name=name)
    if dataclasses.is_dataclass(kind):
        kind = kind.class_for(value) if hasattr(kind, "class_for") else kind
        return from_json_values(typing.cast(Any, kind), value, name=name)
    if origin is tuple and dataclasses.is_dataclass(inner[0]) and isinstance(value, list):
        numbered = enumerate(value)
        return tuple(convert(entry, inner[0], name=f"{name}[{n}]") for n, entry in numbered)
    require_short(value, name=name)
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError):
        raise ValueError(f"{name} must be {_describe(kind)}, not {shorten(value)}") from None


def require_short(value: Any, *, name: str) -> None:
    """Raises ValueError for a text that is too long to be read, since messages quote texts."""
    for text in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(text, str) and len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"{name} has a text of {len(text):,} characters, and at most {MOST_CHARACTERS:,} "
                f"are read: {shorten(text)}"
            )


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _refuse_unknown(values: Any, types_of: dict[str, Any], *, name: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{name or 'the whole'} must be an object, not {shorten(values)}")
    for field in values:
        if field not in types_of:
            raise ValueError(
                f"{_dotted(name, str(field))[:100]} is not a field of this version; known are "
                f"{', '.join(types_of)}"
            )


def _dotted(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field


_NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _describe(kind: Any) -> str:
    """Describes the values of a type, for `must be ...`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return inner[1].description or _NOUNS[inner[0]] + _describe_range(inner[1])
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        count = "a list" if inner[-1] is Ellipsis else f"{len(inner)} values"
        return f"{count}, each {_describe(inner[0])}"
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(_describe, inner))
    return _NOUNS.get(kind, "an object")


def _describe_range(meta: Meta) -> str:
    low, high = (meta.ge if meta.gt is None else meta.gt), (meta.le if meta.lt is None else meta.lt)
    if high is None or high == LARGEST_INT:
        least = " above" if meta.ge is None else " of at least"
        return "" if low is None or low < 0 else f"{least} {low}"
    if low == -LARGEST_FLOAT:
        return " that is finite"
    if high != LARGEST_FLOAT and meta.ge is not None and meta.le is not None:
        return f" in {low} to {high}"
    end = "inf)" if high == LARGEST_FLOAT else f"{high}{')' if meta.le is None else ']'}"
    return f" in {'(' if meta.ge is None else '['}{low}, {end}"
