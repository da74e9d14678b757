"""Ways in which files go wrong, as hypothesis strategies: bytes, JSON, .npy and safetensors."""

import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HUGE = [-1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 10**400]
ODD_VALUES = [
    None, True, False, "", "x", "../../etc/passwd", "\ud800", [], {}, [[]], [None], {"x": 1}, 0, 1,
    2, 0.5, 1e308, float("nan"), float("inf"), *HUGE,
]  # fmt: skip


def fuzz_files(
    originals: Mapping[Path, bytes],
    damaged: Callable[[Path, bytes], st.SearchStrategy[bytes]],
    attempt: Callable[[Path, bool, bool], str],
    is_clear: Callable[[Path, Exception], bool],
    *,
    examples: int,
) -> None:
    """Damages one file at a time and looks what comes; prints how many cases ended how.

    `attempt` gets the file and two choices, and returns a word for how it ended. An error that
    `is_clear` counts as refused.
    """
    counts: Counter[str] = Counter()
    cases = st.sampled_from(sorted(originals)).flatmap(
        lambda path: st.tuples(
            st.just(path), damaged(path, originals[path]), st.booleans(), st.booleans()
        )
    )

    @given(case=cases)
    @thorough(examples)
    def check(case: tuple[Path, bytes, bool, bool]) -> None:
        path, data, *choices = case
        path.write_bytes(data)
        try:
            ended = attempt(path, *choices)
        except Exception as error:
            assert is_clear(path, error), f"{type(error).__name__}: {error}"  # noqa: PT017
            ended = "refused"
        finally:
            for changed, content in originals.items():
                changed.write_bytes(content)
        counts[ended] += 1

    check()
    print(json.dumps(counts))


def thorough(examples: int) -> settings:
    """The same examples at every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Flipped, cut, lengthened, overwritten or emptied bytes."""
    data = bytearray(content)
    kind = draw(
        st.sampled_from(["flip", "flip", "flip", "cut", "longer", "zeros", "junk", "empty"])
    )
    if kind == "empty" or not data:
        return b""
    place = draw(st.integers(0, len(data) - 1))
    if kind == "flip":
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(data) - 1))
            data[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del data[place:]
    elif kind == "longer":
        data += draw(st.binary(min_size=1, max_size=600))
    elif kind == "zeros":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    else:
        data[place:] = draw(st.binary(max_size=400))
    return bytes(data)


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


NPY_TEXTS = [
    ("'<u", "'>u"), ("'<u", "'|O"), ("'<i4'", "'|O'"), ("'<u2'", "'<U2'"), ("'<u8'", "'<u9'"),
    ("False", "True"), ("'descr'", "'descx'"), ("(", "(("), ("(", "(-"), (",)", ", 1)"),
    (",)", "e9,)"), (",)", "0" * 30 + ",)"), ("{", "["), ("{", "{" + "(" * 90),
    ("{", "{'x': __import__('os'), "), ("}", ""), ("'", '"""'), ("<", "\\x00"), (" ", "\t"),
    ("shape", "shape\x00"),
]  # fmt: skip


@st.composite
def damaged_npy(draw: st.DrawFn, content: bytes, dtype: np.dtype[Any]) -> bytes:
    """Headers that say something else, and rows with numbers that lead nowhere."""
    kind = draw(st.sampled_from(["bytes", "header", "row", "row", "row", "version"]))
    if kind == "bytes":
        return draw(damaged_bytes(content))
    if kind == "version":
        return content[:6] + bytes(draw(st.tuples(*[st.integers(0, 255)] * 4))) + content[10:]
    if kind == "header":
        old, new = draw(st.sampled_from(NPY_TEXTS))
        text = content[10:512].decode("latin-1").replace(old, new, draw(st.integers(1, 3)))
        return content[:10] + text.encode("latin-1").ljust(502)[:502] + content[512:]
    rows = np.frombuffer(content[512:], dtype).copy()
    if not len(rows):
        return content
    row = draw(st.integers(0, len(rows) - 1))
    names = dtype.names or ("",)
    name = draw(st.sampled_from(names))
    field = rows[name] if name else rows
    limits = np.iinfo(field.dtype)
    values = [
        limits.min,
        limits.max,
        limits.max // 2,
        int(field[row]) + 1,
        int(field[row]) - 1,
        0,
        77,
    ]
    value = draw(st.sampled_from(values))
    field[row] = min(max(value, limits.min), limits.max)
    return content[:512] + rows.tobytes()


@st.composite
def damaged_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """Headers that lie about lengths, types, shapes, places and names."""
    kind = draw(st.sampled_from(["bytes", "length", "header", "header", "header"]))
    if kind == "bytes":
        return draw(damaged_bytes(content))
    (length,) = struct.unpack_from("<Q", content)
    if kind == "length":
        value = draw(st.sampled_from([0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1]))
        return struct.pack("<Q", value) + content[8:]
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    name = draw(st.sampled_from(sorted(key for key in header if key != "__metadata__")))
    entry = header[name]
    what = draw(st.sampled_from(["dtype", "shape", "offsets", "remove", "rename", "add", "value"]))
    if what == "dtype":
        entry["dtype"] = draw(st.sampled_from(["F64", "F32", "I64", "BOOL", "F8_E4M3", "U64", "X"]))
    elif what == "shape":
        entry["shape"] = draw(
            st.sampled_from([[], [0], [-1], [1, *entry["shape"]], entry["shape"][::-1], [2**62, 8]])
        )
    elif what == "offsets":
        entry["data_offsets"] = draw(
            st.sampled_from([[0, 0], [0, 2**63], [8, 0], [-8, 0], [0, len(body)], [1, 9]])
        )
    elif what == "rename":
        names = ["", "x", "step.", ".x", "group_step.0", "group_step.9", "exp_avg.nothing"]
        header[draw(st.sampled_from(names))] = header.pop(name)
    elif what == "value":
        header[name] = draw(st.sampled_from(ODD_VALUES))
    else:
        del header[name]
    if what == "add":
        header["surplus"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    if what == "remove":  # as a writer would: no hole is left
        start, end = entry["data_offsets"]
        body = body[:start] + body[end:]
        for other in header.values():
            if isinstance(other, dict) and other.get("data_offsets", [0])[0] >= end:
                other["data_offsets"] = [at - (end - start) for at in other["data_offsets"]]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
