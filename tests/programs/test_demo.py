"""The demo, shortened, and what it must never do."""

from __future__ import annotations

import pytest
from PIL import Image
from program_runs import run

pytestmark = pytest.mark.dali


@pytest.mark.slow
def test_the_demo_ends_with_its_figure_and_leaves_its_images(tmp_path):
    out = tmp_path / "demo"
    done = run("demo", "--out", out, "--samples", "1280")
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
    assert "choose another --out" in run("demo", "--out", tmp_path, expect=1).stderr
    assert (tmp_path / "thesis.txt").read_text() == "not yours"
