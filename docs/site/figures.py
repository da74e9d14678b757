"""Measures again what the README, docs/performance.md and docs/benchmarks.md show: `make figures`.

    python docs/site/figures.py --test-data DATA --work FOLDER [--only NAME...]

Each committed result of `unicl-bench` holds the options that made it. It is made again with these
options, on data sets that are packed in FOLDER, and then the page and the chart are. Use a quiet
machine. DATA is the folder of test data that CONTRIBUTING.md names.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_page
import loader_chart

_DECODE = "DATA/decode/labels.csv --image-column file --label-column wnid --class-names imagenet"
_CIFAR = "DATA/cifar10/cifar10-test.zip --templates simple"
PACKED = {
    "decode-full": _DECODE,
    "decode-full-raw": f"{_DECODE} --format ppm",
    "decode-256": f"{_DECODE} --resize short:256",
    "decode-256-raw": f"{_DECODE} --resize square:256 --format raw",
    "decode-60": f"{_DECODE} --resize short:60",
    "decode-60-raw": f"{_DECODE} --resize short:60 --format ppm",
    "flickr-train": "WORK/flickr-train.jsonl --image-root DATA/captions/flickr8k",
    "cifar10-simple": _CIFAR,
    "cifar10-32": f"{_CIFAR} --resize short:32",
    "cifar10-32-raw": f"{_CIFAR} --format raw",
}
"""Data sets by name, with the options of `unicl-pack build` that make them."""
_PLACES = {
    "data/decode": "decode",
    "flickr8k/captions.jsonl": "captions/flickr8k/captions.jsonl",
    "coco/captions.jsonl": "captions/coco/captions.jsonl",
}  # fmt: skip
"""Places under DATA of what results name by its last two parts."""
_TRAIN_CAPTIONS = 600


def results() -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """The program, the file and the content of each result on the page."""
    for section in benchmark_page.SECTIONS:
        for path in sorted(benchmark_page.ROOT.glob(section.files)):
            yield section.command, path, json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Entry point; ends with 1 if a program fails, after those before it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test-data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for packed data sets")
    parser.add_argument("--only", nargs="+", default=[], help="how their files' names begin")
    arguments = parser.parse_args()
    data, work = arguments.test_data.resolve(), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for program, path, result in results():
        if arguments.only and not path.name.startswith(tuple(arguments.only)):
            continue
        command = benchmark_page.command(program, _located(result["settings"], data, work))
        _run(f"{command} --json {shlex.quote(str(path))}".split(" ", 1)[1])
        benchmark_page.PAGE.write_text(benchmark_page.page(), encoding="utf-8")
    loader_chart.draw()
    print("now compare README.md and docs/performance.md, whose figures are written by hand")


def _located(settings: dict[str, Any], data: Path, work: Path) -> dict[str, Any]:
    """The settings with the places of data here, which are packed if need be."""

    def place(name: str) -> str:
        last = name.rpartition("/")[2]
        if last in PACKED:
            return _packed(last, data, work)
        return str(data / _PLACES.get(name, name))

    raw = settings["data"].rpartition("/")[2] + "-raw" if "raw_data" in settings else ""
    settings = settings | ({"raw_data": raw} if raw in PACKED else {})
    located = {key: place(settings[key]) for key in ("data", "raw_data") if settings.get(key)}
    if settings.get("files"):
        located["files"] = [place(name) for name in settings["files"]]
    return settings | located


def _packed(name: str, data: Path, work: Path) -> str:
    out = work / name
    if not out.is_dir():
        lines = (
            (data / "captions/flickr8k/captions.jsonl").read_text(encoding="utf-8").splitlines(True)
        )
        (work / "flickr-train.jsonl").write_text("".join(lines[:_TRAIN_CAPTIONS]), encoding="utf-8")
        words = [
            word.replace("DATA", str(data)).replace("WORK", str(work))
            for word in PACKED[name].split()
        ]
        command = [sys.executable, "-m", "unicl_fast.tools.pack", "build", *words]
        subprocess.run([*command, "--out", str(out)], check=True)
    return str(out)


def _run(words: str) -> None:
    print(f"\nunicl-bench {words}", flush=True)
    command = [sys.executable, "-m", "unicl_fast.tools.bench", *shlex.split(words)]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        sys.exit(f"unicl-bench {words} ended with {code}; those before it are done")


if __name__ == "__main__":
    main()
