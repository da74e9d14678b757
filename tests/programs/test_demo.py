"""The demo, shortened, and what it must never do."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from examples import demo


@pytest.mark.slow
@pytest.mark.dali
def test_the_demo_ends_with_its_figure_and_leaves_its_images(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, demo.__file__, "--out", str(out), "--samples", "256"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
    with pytest.raises(SystemExit, match="choose another --out"):
        demo.make_anew(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "not yours"
