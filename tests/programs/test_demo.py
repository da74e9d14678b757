"""The demo, shortened, and what it must never do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.dali

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, env=env
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_the_demo_ends_with_its_figure_and_leaves_its_images(tmp_path):
    out = tmp_path / "demo"
    done = run("--out", out, "--samples", "1280")
    last = done.stdout.splitlines()[-1]
    assert last.startswith("zero-shot top-1: ")
    assert 0 <= float(last.split(": ")[1]) <= 100
    for name in ("contact-sheet.png", "curves.png"):
        assert Image.open(out / "run" / name).size[0] > 300
    assert (out / "run" / "metrics.jsonl").is_file()
    # the closing lines can be followed on any machine
    assert "unicl-pretrain --preset auto --data.train packed/labels packed/capt" in done.stdout
    for words in ("unicl-pack build", "unicl-eval"):
        assert words in done.stdout


def test_the_demo_removes_nothing_but_an_earlier_demo(tmp_path):
    (tmp_path / "thesis.txt").write_text("not yours")
    assert "choose another --out" in run("--out", tmp_path, code=1).stderr
    assert (tmp_path / "thesis.txt").read_text() == "not yours"
