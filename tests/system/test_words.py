"""What programs say of one thing, and of several."""

from __future__ import annotations

from pathlib import Path

import pytest
from pack_runs import jpeg, run_pack

from unicl_fast.system.wording import count_of


def test_one_thing_is_no_plural() -> None:
    assert count_of(1, "image") == "1 image"
    assert count_of(0, "class") == "0 classes"
    assert count_of(2000, "caption") == "2,000 captions"


def test_a_data_set_of_one_image_is_spoken_of_in_the_singular(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "1.jpg").write_bytes(jpeg(1))
    one, merged = tmp_path / "one", tmp_path / "merged"
    words = "1 image, 0 captions, 1 label of 1 class"
    for arguments in (
        ("build", tmp_path / "in", "--out", one, "--workers", 1),
        ("inspect", one, "--no-near", "--html", tmp_path / "page.html"),
        ("merge", one, "--out", merged),
    ):
        code, said = run_pack(*arguments, capsys=capsys)
        assert code == 0
        assert words in said
    page = (tmp_path / "page.html").read_text()
    assert "<title>one: 1 image</title>" in page
    assert "1 classes" not in page
    assert "1 images" not in page
