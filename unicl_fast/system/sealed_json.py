"""JSON objects with a checksum of their own content.

A text file has nothing to tell a flipped digit by. The seal is one more field, the XXH3-64 of the
other fields in a fixed spelling, so that white space and the order of fields do not matter. Objects
without one, as earlier versions wrote them, are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

_SEAL = "seal"


def seal(values: Mapping[str, Any]) -> str:
    """The text of a JSON object with its seal."""
    return json.dumps({**values, _SEAL: _checksum(values)}, indent=1)


def unseal(text: bytes) -> dict[str, Any]:
    """The object in a text, without its seal.

    Raises:
        ValueError: it is no JSON object, or not the one that was sealed.
    """
    try:
        values = json.loads(text.decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"an object is expected, not a {type(values).__name__}")
        found = values.pop(_SEAL, None)
        if found is not None and found != _checksum(values):
            raise ValueError("its content is not what was written (checksum)")
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    # through JSON first: tuples become lists and keys strings there, before they are sorted
    plain = json.loads(json.dumps(dict(values)))
    return str(xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode("ascii")))
