"""`unicl-bench input`: contestants that differ are not timed, waiting ones do not run.

Most tests use the contestants of tests/helpers/fake_contenders.py, whose processes start quickly.
"""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_sets import Sample, pack
from PIL import Image

from benchmarks.input import run as race
from benchmarks.input.contenders import OURS, PARTS, PEERS, Contender, ContenderError, Kind, gap_to
from benchmarks.input.report import table, verdict
from benchmarks.input.run import Input
from benchmarks.input.worker import session_bytes
from unicl_fast.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


def fake(function: str, kind: Kind = "peer", **more: Any) -> Contender:
    facts = {"name": function.replace("_", "-"), "about": "for tests"} | more
    return Contender(kind=kind, code=f"fake_contenders:{function}", **facts)


@pytest.fixture(autouse=True)
def _workers_find_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 smooth images, 60 x 80, faintly coloured: no filter's choice is stressed."""
    out = tmp_path_factory.mktemp("input") / "packed"
    draw = np.random.default_rng(0)
    samples = []
    for index in range(24):
        # FFmpeg scales luma and halved chroma on grids of their own: strong colours would tell
        colours = draw.integers(20, 236, (4, 5, 1)) + draw.integers(-20, 20, (4, 5, 3))
        file = io.BytesIO()
        image = Image.fromarray(colours.astype(np.uint8))
        image.resize((80, 60), Image.Resampling.BICUBIC).save(file, format="JPEG")
        samples.append(Sample(file.getvalue(), labels=[index % 2]))
    with pack(out, samples, class_names=["even", "odd"], tokenizer=Tokenizer()):
        return out


def stage_for(packed: Path, json_path: Path | None = None, **more: Any) -> Input:
    small: dict[str, Any] = {"batch_size": 8, "image_size": 16, "threads": 1}
    return Input(data=packed, json=json_path, **(small | {"rounds": 2, "seconds": 0.1} | more))


def test_contestants_that_differ_are_left_out_and_the_others_are_timed(
    packed, tmp_path, monkeypatch,
    capsys,
):  # fmt: skip
    peers = ("honest", "nearest", "flipped", "bytes_instead", "darker_crops", "dies")
    fakes = [fake(name) for name in peers]
    fakes.append(fake("not_installed", install="pip install a-package"))
    monkeypatch.setattr(race, "OURS", fake("honest", "ours", name="unicl_fast"))
    monkeypatch.setattr(race, "PEERS", tuple(fakes))
    stage_for(packed, tmp_path / "result.json", parts=("none",)).run()
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["contenders"]) == {"unicl_fast", "honest"}
    expected = {
        "nearest": r"other images: \d+\.\d+ levels",
        "flipped": r"other images: \d+\.\d+ levels",
        "bytes-instead": r"^made uint8 \(16, 3, 16, 16\), not float32",
        "darker-crops": "images' mean is .* ours is",
        "dies": "process ended with code 9",
        "not-installed": "a_package_that_nobody_has.*pip install a-package",
    }
    assert set(result["left_out"]) == set(expected)
    for name, reason in expected.items():
        assert re.search(reason, result["left_out"][name]), name
    said = capsys.readouterr().out
    assert "not-installed is left out" in said
    assert re.search(
        r"unicl_fast makes .* images/s: .* times honest, the fastest peer of 1\n", said
    )
    ratio = result["figures"]["unicl_fast / honest"]
    assert len(ratio["all"]) == 2
    assert ratio["low"] > 0
    assert result["figures"]["honest, MB"]["low"] > 5
    assert result["contenders"]["honest"]["levels_from_pillow"]["mean"] < 0.01
    assert result["settings"]["data"].endswith("packed")
    text = table(result)
    assert re.search(r"^\| honest +\|", text, re.MULTILINE)
    assert "left out: No module named" in text


def test_the_verdict_names_the_fastest_peer_and_the_nearest_limit():
    def figure(value: float) -> dict[str, float]:
        return {"median": value, "low": 0.9 * value, "high": 1.1 * value}

    rates = {"unicl_fast": 100, "dali": 40, "timm": 50, "decode": 125, "read": 9000}
    figures = {f"{name}, images/s": figure(rate) for name, rate in rates.items()}
    figures |= {f"unicl_fast / {name}": figure(100 / rate) for name, rate in rates.items()}
    kinds = {"unicl_fast": "ours", "dali": "peer", "timm": "peer"}
    contenders = {name: {"kind": kinds.get(name, "limit")} for name in rates}
    assert verdict({"figures": figures, "contenders": contenders}) == (
        "unicl_fast makes 100 (90 to 110) images/s: 2.00 (1.80 to 2.20) times timm, the fastest "
        "peer of 2, and 0.80 (0.72 to 0.88) of the nearest limit, decode"
    )


def test_ours_making_something_else_ends_the_run(packed, monkeypatch):
    monkeypatch.setattr(race, "OURS", fake("flipped", "ours"))
    with pytest.raises(RuntimeError, match="flipped: it makes other images"):
        stage_for(packed, peers=("none",), parts=("none",)).run()


def test_an_image_is_compared_with_the_one_it_shows():
    truth = np.random.default_rng(0).uniform(0, 255, (6, 16, 16, 3)).astype(np.float32)
    gap = gap_to(truth, truth[[3, 1, 5, 0, 4, 2, 2]] + 1)
    assert gap.mean == pytest.approx(1, abs=1e-4)
    assert gap.high == pytest.approx(1, abs=1e-4)
    with pytest.raises(ContenderError, match="only 2 of 6 images"):
        gap_to(truth, truth[[3, 1, 3, 1]])


@pytest.mark.dali
@pytest.mark.parametrize(
    "contender",
    [pytest.param(one, id=one.name, marks=[pytest.mark.long] * (one.name != "dali"))
     for one in (OURS, *PEERS)],
)  # fmt: skip
def test_every_contender_makes_pillow_s_images(contender, packed, monkeypatch, tmp_path):
    """Those whose package is there."""
    monkeypatch.setattr(race, "OURS", OURS)
    monkeypatch.setattr(race, "PEERS", (contender,) if contender != OURS else ())
    parts = ("all",) if contender == OURS else ("none",)
    json_path = tmp_path / "result.json"
    stage_for(packed, json_path, rounds=1, parts=parts, image_size=32).run()
    result = json.loads(json_path.read_text())
    expected = {contender.name, OURS.name, *(each.name for each in PARTS if contender == OURS)}
    if contender.name in result["left_out"]:
        assert contender.install
        assert contender.install in result["left_out"][contender.name]
        pytest.skip(result["left_out"][contender.name])
    assert set(result["contenders"]) == expected


_HOLDER = """
import os
import numpy
held = numpy.ones(100_000_000, numpy.uint8)
forked = os.fork() == 0
if forked:
    own = numpy.ones(30_000_000, numpy.uint8)
os.write(1, b"c" if forked else b"p")
os.read(0, 1)
"""


def test_memory_of_a_session_counts_what_is_shared_once_and_whole():
    """NumPy's libraries are mapped by this process too; its array by the process and its fork."""
    command = [sys.executable, "-c", _HOLDER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        process.stdout.read(2)
        held = session_bytes(process.pid)
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.stdin.write(b"..")
        process.stdin.close()
    (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
    expected = 1024 * int(resident) + 30_000_000
    assert held == pytest.approx(expected, abs=8_000_000)
    assert held > 100_000_000
