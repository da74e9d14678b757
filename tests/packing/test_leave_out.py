"""`unicl-pack build --leave-out`."""

import os

import pytest
from pack_runs import build_set, jpeg, samples_of

from unicl_fast.packing.build import build_dataset

pytestmark = pytest.mark.usefixtures("checked")


def test_a_list_that_does_not_tell_sources_called_alike_apart_is_refused(tmp_path, pack):
    """Else a copy's row would take the image that stays as well, and nobody would notice."""
    places = [tmp_path / folder / "train" for folder in "ab"]
    for number, place in enumerate(places):
        (place / "cat").mkdir(parents=True)
        for name in ("1", "2"):  # four equal images, and one of their own
            (place / "cat" / f"{name}.jpg").write_bytes(jpeg(1))
        (place / "cat" / f"own{number}.jpg").write_bytes(jpeg(2 + number))
    build_set(places, tmp_path / "all")
    pack("inspect", tmp_path / "all", "--no-near", "--duplicates-list", tmp_path / "copies.csv")
    rows = (tmp_path / "copies.csv").read_text().splitlines()
    assert len(rows) == 1 + 3
    before = set(os.listdir(tmp_path))
    for sources in (places, [tmp_path / "all"]):
        said = pack(
            *("build", *sources, "--leave-out", tmp_path / "copies.csv", "--out", tmp_path / "x"),
            code=2,
        )
        assert "of train in 1 row, and more samples are called so" in said
        assert "several sources are called train" in said
    assert set(os.listdir(tmp_path)) == before
    for name in ("1", "2"):  # who means all of them says so
        rows += [f"train,cat/{name}.jpg,,"] * 2
    (tmp_path / "copies.csv").write_text("\n".join(rows))
    options = {"leave_out": str(tmp_path / "copies.csv"), "progress": False}
    for name, sources in (("built", places), ("again", [tmp_path / "all"])):
        build_dataset(sources, tmp_path / name, workers=1, **options)
        assert {one.name for one in samples_of(tmp_path / name)} == {"cat/own0.jpg", "cat/own1.jpg"}


def test_a_name_that_is_not_utf_8_can_be_left_out(tmp_path):
    source = tmp_path / "in\udcff"
    (source / "cat").mkdir(parents=True)
    for number, name in enumerate((b"\xff.jpg", b"plain.jpg")):
        with open(bytes(source / "cat") + b"/" + name, "wb") as file:
            file.write(jpeg(number))
    (tmp_path / "out.csv").write_text(
        "source,name\nin\\udcff,cat/\\udcff.jpg\nother,cat/plain.jpg\nin\\udcff,cat/none.jpg\n"
    )
    options = {"leave_out": str(tmp_path / "out.csv"), "progress": False}
    build_set([source], tmp_path / "all")
    assert {one.name for one in samples_of(tmp_path / "all")} == {"cat/\udcff.jpg", "cat/plain.jpg"}
    for name, place in {"in": source, "all": tmp_path / "all"}.items():
        summary = build_dataset([place], tmp_path / f"of {name}", workers=1, **options)
        assert summary.passed_over == {f"images named in {tmp_path / 'out.csv'}": 1}
        assert {one.name for one in samples_of(tmp_path / f"of {name}")} == {"cat/plain.jpg"}
    with pytest.raises(ValueError, match=r"--leave-out .* not s3://bucket/list\.csv: copy it here"):
        build_set([source], tmp_path / "no", leave_out="s3://bucket/list.csv")
