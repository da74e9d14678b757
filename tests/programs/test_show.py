"""`unicl-pack show`: a sheet with the rows it should have, and with what training would show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program_runs import call

from unicl_fast.augmentation import parse_augmentation
from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.tools.pack import __main__ as pack_dataset
from unicl_fast.tools.pack import show as show_dataset
from unicl_fast.tools.pack.show import _run, _strips

pytestmark = pytest.mark.dali


def strips_of(folder: Path, spec: str) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Titles, notes, and images [strips n s s 3]."""
    augmentation, data = parse_augmentation(spec), DataConfig(image_size=32, evaluation_resize=32)
    with PackedDataset(folder) as dataset:
        ids = [0, 3, 7]
        strips = list(_strips(augmentation, dataset.samples[ids], data, seed=1))
        images = _run(strips, [dataset.image_bytes(i) for i in ids], augmentation, data)
    return [strip.title for strip in strips], [strip.notes for strip in strips], images


@pytest.mark.slow
def test_each_step_has_a_row_of_its_own_and_does_what_its_title_says(data: Path) -> None:
    spec = "none,policy=auto,grayscale=0.1,erase=0.1,jitter=0.4,blur=0.1"
    titles, notes, images = strips_of(data / "captions", spec)
    assert titles[0] == "centre"
    assert titles[1:4] == ["ShearX", "Rotate", "Contrast"]
    assert titles[-7:] == ["colour jitter", "grayscale", "blur", "erasing", *["all together"] * 3]
    centre = images[0].astype(int)
    for title, shown in zip(titles[1:], images[1:].astype(int), strict=True):
        assert np.abs(shown - centre).max() > 0, title
    of = dict(zip(titles, images, strict=True))
    assert np.array_equal(of["Invert"], 255 - images[0])
    assert np.ptp(of["grayscale"].astype(int), axis=-1).max() <= 1
    assert dict(zip(titles, notes, strict=True))["Posterize"][0].endswith("bits")


def test_views_are_two_rows_and_a_mild_augmentation_has_no_steps(data: Path) -> None:
    assert strips_of(data / "labels", "supcon")[0][-2:] == ["view 1", "view 2"]
    assert strips_of(data / "labels", "clip")[0] == ["centre", *["all together"] * 3]


def test_the_program_draws_a_sheet_and_says_where(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, full = tmp_path / "sheets" / "plain.png", tmp_path / "full.png"
    call(pack_dataset, "show", data / "captions", "--samples", "4", "--out", plain)
    call(
        *(pack_dataset, "show", data / "labels", "--augment", "none,blur=1,erase=1"),
        *("--samples", "2", "--image-size", "32", "--out", full),
    )
    assert str(plain) in capsys.readouterr().out
    width, height = Image.open(plain).size
    assert width > 2 * height  # one row of four
    width, height = Image.open(full).size
    assert height > 2 * width  # seven rows of two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--augment", "strong"], "no 'strong' to start from"),
        (["--samples", "0"], "--samples must be at least 1"),
    ],
)
def test_wrong_input_is_one_sentence(
    data: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(pack_dataset, "show", data / "labels", "--out", tmp_path / "x.png", *options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_texts_are_labels_by_name_or_captions(data: Path) -> None:
    with PackedDataset(data / "labels") as labels, PackedDataset(data / "captions") as captions:
        assert show_dataset._text_of(labels, 0) in labels.manifest.class_names
        assert len(show_dataset._text_of(captions, 0)) > 10
