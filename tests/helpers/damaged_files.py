"""Ways in which files go wrong, as hypothesis strategies, and checksums that fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from unicl_fast.checkpoints.load import DamagedCheckpointError
from unicl_fast.system.checksums import dump_checksummed_json, file_checksum

HUGE = [-1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 10**400]
ODD_VALUES = [
    None, True, False, "", "x", "../../etc/passwd", "\ud800", [], {}, [[]], [None], {"x": 1}, 0, 1,
    2, 0.5, 1e308, float("nan"), float("inf"), *HUGE,
]  # fmt: skip


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """The text of an object in which one thing is of another value or type, gone, new or double."""
    values = json.loads(content)
    kind = draw(st.sampled_from(["set", "set", "set", "remove", "add", "double", "deep", "digits"]))
    holder, key = _somewhere(draw, values)
    if kind == "set":
        holder[key] = draw(st.sampled_from(ODD_VALUES))
    elif kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["unknown", "", "version"]))] = draw(
            st.sampled_from(ODD_VALUES)
        )
    elif kind == "deep":
        holder[key] = "DEEP"
    elif kind == "digits":
        holder[key] = "DIGITS"
    text = json.dumps(values)
    if kind == "double":
        text = '{"version": 1, "step": 1, "step": 1, ' + text[1:]
    depth = draw(st.sampled_from([100, 990, 100_000]))
    text = text.replace('"DEEP"', "[" * depth + "]" * depth).replace('"DIGITS"', "9" * 5000)
    return text.encode()


def _somewhere(draw: st.DrawFn, values: Any) -> tuple[Any, Any]:
    """A container inside `values` and a key or place in it."""
    holder, key = values, draw(st.sampled_from(sorted(values)))
    while isinstance(holder[key], (dict, list)) and holder[key] and draw(st.booleans()):
        holder = holder[key]
        keys = sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw(st.sampled_from(keys))
    return holder, key


def is_clear(error: Exception) -> bool:
    """Our own words, not an error of a library passed on."""
    return type(error) in (ValueError, FileNotFoundError, DamagedCheckpointError) and bool(
        str(error)
    )


def make_fit(checkpoint: Path) -> None:
    """Checksums and seal of what is there now; a state that is no JSON stays as it is."""
    try:
        state = json.loads((checkpoint / "state.json").read_bytes())
        for name in state["checksums"]:
            state["checksums"][name] = file_checksum(checkpoint / name)
        state.pop("seal", None)
        (checkpoint / "state.json").write_text(dump_checksummed_json(state))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return
