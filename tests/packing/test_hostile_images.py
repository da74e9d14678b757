"""Packing what was made to break decoders: what is taken, what is left out, and at what price."""

import json
from pathlib import Path

import pytest
from bombs import BOMBS, SOUND_BOMBS, honest
from children import run_python
from pack_runs import left_out

pytestmark = pytest.mark.slow

MAX_PIXELS = 1_000_000

# ru_maxrss of a child starts at what its parent had, so builds are measured from a small parent.
MEASURED_BUILD = """
import json, resource, sys
from unicl_fast.packing.build import build_dataset

if __name__ == "__main__":
    source, out, max_pixels, format = sys.argv[1:]
    summary = build_dataset(
        [source], out, max_pixels=int(max_pixels), format=format, workers=1, progress=False
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    packed = summary.manifest.num_samples
    print(json.dumps({"peak": peak, "packed": packed, "seconds": summary.seconds}))
"""


def measured_build(
    source: Path, out: Path, tmp_path: Path, max_pixels: int, format: str = "keep"
) -> dict[str, float]:
    """Packs in a process of its own; returns its worker's peak memory with what was packed."""
    script = tmp_path / "measured_build.py"
    script.write_text(MEASURED_BUILD)
    return json.loads(run_python(script, source, out, max_pixels, format))


@pytest.fixture(scope="module")
def peak_at_rest(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What a worker takes that has only seen tiny images, whose decoders it has loaded."""
    place = tmp_path_factory.mktemp("tiny")
    (place / "in" / "x").mkdir(parents=True)
    for name, data in honest(8).items():
        (place / "in" / "x" / name).write_bytes(data)
    return measured_build(place / "in", place / "out", place, MAX_PIXELS)["peak"]


@pytest.mark.parametrize("format", ["keep", pytest.param("webp", marks=pytest.mark.long)])
def test_a_worker_takes_no_more_memory_than_its_pixels_need(tmp_path, peak_at_rest, format):
    """Bombs of every format, and honest images at the very limit: 40 bytes a pixel hold it."""
    bombs = tmp_path / "bombs" / "x"
    bombs.mkdir(parents=True)
    for name, make in BOMBS.items():
        (bombs / name).write_bytes(make())
    for name, data in honest(1000).items():
        (bombs / name).write_bytes(data)
    found = measured_build(tmp_path / "bombs", tmp_path / "b", tmp_path, MAX_PIXELS, format)
    largest_file = max(path.stat().st_size for path in bombs.iterdir())
    assert found["peak"] - peak_at_rest < 40 * MAX_PIXELS + 3 * largest_file
    refused = {name.removeprefix("x/") for name in left_out(tmp_path / "b")}
    assert set(BOMBS) - refused == SOUND_BOMBS
    assert refused <= set(BOMBS)
    assert found["seconds"] < 120
