"""The grand tour: all real data from its sources to one verified data set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import look_at

from unicl_fast.tools.tour import DATA_SETS, main

pytestmark = pytest.mark.dist

SAMPLES = {
    "cifar10-train": 50_000,
    "cifar10-test": 10_000,
    "tiny-imagenet": 4_000,
    "imagenet": 280,
    "flickr8k": 700,
    "coco": 100,
    "textures": 120,
    "hostile": 175,
}
SMALL = ("coco", "textures", "hostile")


def toured(data: Path, out: Path, *options: str) -> dict[str, dict[str, Any]]:
    main([str(data), "--out", str(out), *options])
    rows = json.loads((out / "table.json").read_text())
    return {row["name"]: row for row in rows}


def check(rows: dict[str, dict[str, Any]], *, num_hostile: int = SAMPLES["hostile"]) -> None:
    counts = {name: row["num_samples"] for name, row in rows.items()}
    total = counts.pop("everything")
    assert counts == {name: SAMPLES[name] for name in counts} | {"hostile": num_hostile}
    assert total == sum(counts.values())
    assert {row["verify"] for row in rows.values()} == {"sound"}
    refused = {name: sum(row["refused"].values()) for name, row in rows.items()}
    # one of the 434 files is passed over by its name
    assert refused.pop("hostile") == refused.pop("everything") == 434 - num_hostile - 1
    assert set(refused.values()) == {0}


@pytest.mark.slow
def test_small_sets_as_webp(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tour"
    options = ("--sets", *SMALL, "--format", "webp", "--resize", "short:64", "--no-near")
    # one of the hostile images is too wide for WebP
    check(toured(shared_data, out, *options), num_hostile=SAMPLES["hostile"] - 1)
    text = capsys.readouterr().out
    assert text.count("$ unicl-pack build") == len(SMALL) + 1
    assert text.count("sound") >= len(SMALL) + 1
    for width in (360, 1280):
        page = look_at(out / "everything.html", tmp_path, width=width)
        assert page["broken_images"] == 0
        assert page["images"] >= 48
        assert page["scroll_width"] <= width
        assert not page["beside"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_everything_as_it_is(shared_data: Path, tmp_path: Path) -> None:
    rows = toured(shared_data, tmp_path / "tour")
    assert rows.keys() == set(DATA_SETS) | {"everything"}
    check(rows)


def test_what_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "set UNICL_TEST_DATA" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--sets", "mnist"])
    assert stopped.value.code == 2
    assert re.search("--sets takes cifar10-test, .*, not mnist", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "usage: python -m unicl_fast.tools.tour" in capsys.readouterr().out
