"""What comes from others has a bound in memory and time, at every entrance."""

import re
from collections.abc import Iterator

import pytest
from entrances import ENTRANCES, enter

from unicl_fast.system.child import Death, run_limited

MEMORY_BYTES, SECONDS = 1_000_000_000, 120.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | Death]:
    """What each entrance says in one child, which imports once; a new one follows a death."""

    def tasks() -> Iterator[tuple[str, str]]:
        for name in ENTRANCES:
            yield name, str(tmp_path_factory.mktemp(name))

    found = run_limited(enter, tasks(), memory_bytes=MEMORY_BYTES, seconds=SECONDS)
    return dict(zip(ENTRANCES, found, strict=True))


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_hostile_input_is_refused_within_a_gigabyte_and_by_name(entrance, refusals):
    found = refusals[entrance]
    assert not isinstance(found, Death), found
    assert found, "it was not refused"
    assert re.search(ENTRANCES[entrance], found), found[:500]
