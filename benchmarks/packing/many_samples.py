"""How much memory `unicl-pack build` takes for a list of a million rows, and how long opening it.

    python -m unicl_fast.benchmarks.packing.many_samples --samples 1000000

A JSONL list names a thousand small images again and again, by ever new paths and with captions of
their own, so that reading, ordering and writing are those of as many pairs while decoding costs
little. Measured are the peak of resident memory of the main process (VmHWM; workers hold one
image each and do not grow with the number), the seconds until the first sample is packed, and
the seconds that opening the finished data set takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from unicl_fast.dataset.reader import PackedDataset

_IMAGES = 1000
_CAPTION = "number {} of many images, with a caption of its own"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to work; by default in /tmp")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_list(folder, options.samples)
        result: dict[str, float] = {"samples": options.samples}
        result |= build(folder, options.workers)
        result |= open_set(folder / "set")
        print(json.dumps(result))


def make_list(folder: Path, count: int) -> None:
    """Images of 8 x 8 pixels, links that give them many names, and the list."""
    images = folder / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for number in range(_IMAGES):
        pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number:03d}.png")
    for number in range(-(-count // _IMAGES)):
        (folder / f"{number:05d}").symlink_to(images)
    with (folder / "list.jsonl").open("w") as file:
        for number in range(count):
            link, image = divmod(number, _IMAGES)
            row = {"image": f"{link:05d}/{image:03d}.png", "caption": _CAPTION.format(number)}
            file.write(json.dumps(row) + "\n")


def build(folder: Path, workers: int) -> dict[str, float]:
    """Packs the list; megabytes and seconds."""
    command = [
        *(sys.executable, "-m", "unicl_fast.tools.pack", "build"),
        *(str(folder / "list.jsonl"), "--out", str(folder / "set"), "--workers", str(workers)),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = at_first = first = 0.0
    while process.poll() is None:
        peak = max(peak, _peak_megabytes(process.pid))
        if not first and any(folder.glob("set.partial*/**/shard-000000.tar")):
            first, at_first = time.perf_counter() - started, peak
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"unicl-pack ended with {process.returncode}")
    return {
        "peak_megabytes": peak,
        "peak_megabytes_before_packing": at_first,
        "seconds_before_packing": round(first, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _peak_megabytes(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    sizes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return round(sizes[0] * 1024 / 1e6, 1) if sizes else 0.0


def open_set(folder: Path) -> dict[str, float]:
    """Opens the data set three times; the middle of the seconds."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with PackedDataset(folder) as dataset:
            assert len(dataset) > 0
            seconds.append(time.perf_counter() - started)
    return {"seconds_to_open": round(sorted(seconds)[1], 3)}


if __name__ == "__main__":
    main()
