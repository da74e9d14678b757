"""Where two descriptions of a run differ, down to the element, for who has to mend it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_ABSENT = object()


def refuse_differences(what: str, stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Compares what a checkpoint was trained with and what it shall go on with.

    Args:
        what: the two are of, for the message.
        stored: in JSON's types.
        present: in JSON's types; a tuple is as good as a list.

    Raises:
        ValueError: they differ; names the first element that does, and how many more do.
    """
    differences = list(find_differences(stored, present))
    if not differences:
        return
    more = len(differences) - 1
    others = f" ({more} more {'difference' if more == 1 else 'differences'})" if more else ""
    raise ValueError(
        f"the checkpoint is of another {what}: {differences[0]}{others}; train into another --out, "
        "or give what the checkpoint was trained with"
    )


def find_differences(stored: Any, present: Any, path: str = "") -> Iterator[str]:
    """A phrase for each element that differs, for example "shares[1] was 0.5 and is now 0.25"."""
    if isinstance(stored, Mapping) and isinstance(present, Mapping):
        for name in sorted(set(stored) | set(present)):
            below = f"{path}.{name}" if path else name
            yield from find_differences(
                stored.get(name, _ABSENT), present.get(name, _ABSENT), below
            )
    elif _is_list(stored) and _is_list(present):
        inner = [
            phrase
            for index, pair in enumerate(zip(stored, present, strict=False))
            for phrase in find_differences(*pair, f"{path}[{index}]")
        ]
        if len(stored) == len(present):
            yield from inner
        else:
            # one inserted moves all behind it: where it starts is what tells
            yield (
                f"{path} had {len(stored)} elements and now has {len(present)}"
                f", and {inner[0] if inner else _first_beyond(stored, present, path)}"
            )
    elif stored != present or isinstance(stored, bool) != isinstance(present, bool):
        yield f"{path} was {_shown(stored)} and is now {_shown(present)}"


def _first_beyond(stored: Sequence[Any], present: Sequence[Any], path: str) -> str:
    index = min(len(stored), len(present))
    if len(stored) > index:
        return f"{path}[{index}] was {_shown(stored[index])}"
    return f"{path}[{index}] is now {_shown(present[index])}"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not there"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
