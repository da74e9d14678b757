"""The race: its arithmetic, the list that open_clip gets, and one of a few steps."""

import csv
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import packed_sets
import pytest
from PIL import Image
from program_runs import refusal_of

from benchmarks.race.contestants import Contestant, ImageList, Length
from benchmarks.race.judge import transform_of
from benchmarks.race.report import Interval, Outcome, curve_of, seconds_to, verdict
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import DataConfig
from unicl_fast.conversion.export import write_export
from unicl_fast.images.codec import encode_png
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools import bench as unicl_bench

pytestmark = pytest.mark.slow


def outcome(contestant: str, images: int, seconds: float, score: float, seed: int = 0) -> Outcome:
    return Outcome(
        contestant=contestant, images=images, lr=1e-3, seed=seed, cpu_seconds=seconds,
        wall_seconds=seconds, peak_bytes=10**9, scores={"photos/top1": score},
    )  # fmt: skip


def test_contestants_are_named_before_a_colon():
    muon = Contestant.parse("muon: --optim.name muon --data.augment 'none,erase=1'")
    assert muon == Contestant("muon", ("--optim.name", "muon", "--data.augment", "none,erase=1"))
    assert Contestant.parse("open_clip, light").peer == "open_clip"
    assert not muon.peer
    with pytest.raises(ValueError, match="NAME or NAME: OPTIONS"):
        Contestant.parse(": --wd 1")


@pytest.mark.parametrize(("images", "expected"), [(128, 1), (1000, 8), (11_520, 90), (99_999, 781)])
def test_lengths_are_whole_epochs_of_a_list_in_which_no_row_comes_twice(images, expected):
    length = Length.nearest(images, num_images=500, batch_size=128)
    assert length.steps == pytest.approx(expected, abs=length.epochs / 2)
    assert length.images == 128 * length.steps
    assert length.steps_of_epoch * 128 <= 5 * 500 + 64


def test_intervals_by_hand():
    # deviation 1, t(0.975, 2) = 4.3027
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - 2 == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert f"{found:.1f}" == "2.0 (-0.5 to 4.5)"
    assert f"{Interval.of([2.0]):.1f}" == "2.0"
    gain = Interval.of_difference([3.0, 5.0], [0.0, 2.0])
    # both variances are 2: two degrees of freedom, standard error sqrt(2)
    assert (gain.mean, gain.high - 3) == (3, pytest.approx(4.302652729911275 * math.sqrt(2)))
    assert Interval.of_difference([1.0, 1.0], [3.0, 3.0]) == Interval(-2, -2, -2)


def test_seconds_to_an_accuracy_and_the_verdict_are_read_off_the_curve():
    outcomes = [outcome("ours", 100, 10, 20), outcome("ours", 200, 40, 40)]
    curve = curve_of(outcomes, "ours")
    assert seconds_to(curve, "photos/top1", 30) == pytest.approx(20)  # half way in the logarithm
    assert seconds_to(curve, "photos/top1", 40) == pytest.approx(40)
    assert seconds_to(curve, "photos/top1", 15) == pytest.approx(10)  # the shortest run has more
    assert math.isnan(seconds_to(curve, "photos/top1", 41))
    theirs = [outcome("open_clip", 200, 100, 30, seed) for seed in (0, 1)]
    ours = [
        outcome("ours", images, seconds, score + seed, seed)
        for images, seconds, score in ((100, 10, 19.5), (200, 40, 39.5))
        for seed in (0, 1)
    ]
    said = verdict([*theirs, *ours], "ours", "open_clip")
    assert "reaches the 30.0 % of open_clip in 0.20 of its CPU seconds" in said
    assert "after 200 images it is at 40.0 %, +10.0 (" in said
    assert "does not reach the 40.0 %" in verdict([*theirs, *ours], "open_clip", "ours")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """40 images of one colour each: labelled ones, captioned ones, and ones with both."""
    folder = tmp_path_factory.mktemp("race")
    colors = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}
    texts = {
        "labels": lambda name: {"labels": [list(colors).index(name)]},
        "captions": lambda name: {"captions": [f"all of it is {name}", f"{name} everywhere"]},
        "both": lambda name: {"labels": [list(colors).index(name)], "captions": [f"so {name}"]},
    }
    for kind, text in texts.items():
        samples = []
        for number in range(40):
            name = list(colors)[number % 3]
            noise = np.random.default_rng(number).integers(-20, 20, (32, 32, 3))
            image = np.clip(noise + colors[name], 0, 255).astype(np.uint8)
            samples.append(packed_sets.Sample(encode_png(image), **text(name)))
        classes = [] if kind == "captions" else list(colors)
        of_set = {"class_names": classes, "tokenizer": Tokenizer()}
        packed_sets.pack(folder / kind, samples, **of_set).close()
    return {kind: folder / kind for kind in texts}


def test_open_clips_list_has_each_image_by_the_weight_of_its_set_with_other_texts(packed, tmp_path):
    images = ImageList([str(packed["labels"]), f"{packed['captions']}"], tmp_path / "images")
    assert images.num_images == 80
    images.write_rows(tmp_path / "rows.tsv", 160, seed=0)
    with (tmp_path / "rows.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert set(Counter(row["filepath"] for row in rows).values()) == {2}
    labels, captions = (
        {row["title"] for row in rows if f"images-{number}" in row["filepath"]} for number in (0, 1)
    )
    templates = ("all of it is {}", "{} everywhere")
    assert captions == {one.format(c) for one in templates for c in ("red", "green", "blue")}
    assert labels >= {"the red.", "a drawing of a green."}
    with Image.open(rows[0]["filepath"]) as image:
        assert image.size == (32, 32)
    weighted = [f"{packed['labels']}=1", f"{packed['both']}=3"]
    images = ImageList(weighted, tmp_path / "weighted")
    images.write_rows(tmp_path / "rows.tsv", 40, seed=0)
    lines = (tmp_path / "rows.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert sum("images-1" in line for line in lines) == 30
    assert {"so red", "so blue"} <= {line.split("\t")[1] for line in lines}
    assert any("drawing" in line for line in lines if "images-1" in line)


@pytest.mark.dali
@pytest.mark.timeout(280)
def test_a_race_of_a_few_steps(packed, tmp_path):
    """Both sides train and are judged; nothing is repeated the second time."""
    shutil.copytree(packed["both"], tmp_path / "a" / "test")  # `--split` gives all one name
    shutil.copytree(packed["captions"], tmp_path / "b" / "test")
    options = [
        *("race", "--train", str(packed["labels"]), str(packed["captions"])),
        *("--test", str(tmp_path / "a" / "test"), str(tmp_path / "b" / "test")),
        *("--out", str(tmp_path / "race")),
        *("--preset", "mixed-small", "--images", "32", "--seeds", "0"),
        *("--lr", "1e-3", "--peer-lr", "1e-3"),
        *("--data.image-size", "32", "--run.global-batch-size", "16"),
        *("--contestants", "unicl", "open_clip, light: --wd 0.01"),
    ]
    unicl_bench.main(options)
    found = json.loads((tmp_path / "race/race.json").read_text())
    assert [run["images"] for run in found["runs"]] == [32, 32]
    kinds = itertools.product("ab", ("image", "text"), (1, 10))
    scores = {f"{part}-test/{kind} R@{k}" for part, kind, k in kinds} | {"a-test/top1"}
    for run in found["runs"]:
        assert set(run["scores"]) == scores
        assert all(0 <= score <= 100 for score in run["scores"].values())
        assert run["cpu_seconds"] > 1
        assert run["peak_bytes"] > 1e8
    assert all("of open_clip, light" in line for line in found["verdict"])
    assert (tmp_path / "race/race.png").is_file()
    paths = sorted((tmp_path / "race").rglob("outcome.json"))
    before = [path.stat().st_mtime_ns for path in paths]
    unicl_bench.main(options)
    assert [path.stat().st_mtime_ns for path in paths] == before


@pytest.mark.parametrize("resize", [40, "squash", "longest"])
def test_the_judge_resizes_images_as_configured(resize):
    half = (0.5, 0.5, 0.5)
    data = DataConfig(image_size=32, evaluation_resize=resize, mean=half, std=half)
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, 30:60] = 255  # as wide as a third of the image
    row = transform_of(data)(Image.fromarray(pixels))[0, 16]
    white = {40: 20, "squash": 11, "longest": 11}[resize]
    assert (row.shape, abs(int((row > 0.5).sum()) - white) <= 1) == ((32,), True)


@pytest.mark.dali
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    "contestants",
    [
        ("unicl: --optim.name adamw", "open_clip: --wd 0"),
        ("sentence_transformers: CachedMultipleNegativesRankingLoss mini_batch_size=8",),
    ],
)
def test_contestants_start_from_a_model_by_name(contestants, packed, tmp_path):
    """At a rate of nothing a run keeps the scores of its start, here of a ViT that timm lacks."""
    if "sentence" in contestants[0]:
        pytest.importorskip("datasets")
        pytest.importorskip("accelerate")
    vit = {"image_encoder": "unicl_vit_clip_patch16_w32_d1_h2_m64_gelu_32", "text_norm_eps": 1e-6}
    sizes = {"image_size": 32, "evaluation_resize": 32}
    config = build_preset("mixed-small").changed(model=vit, data=sizes)
    write_export(build_model(config).eval(), tmp_path / "start")
    options = [
        *("race", "--train", str(packed["both"]), "--test", str(packed["both"])),
        *("--out", str(tmp_path / "race"), "--init", str(tmp_path / "start")),
        *("--images", "16", "--seeds", "0", "--lr", "1e-12", "--peer-lr", "1e-12"),
        *("--run.global-batch-size", "16", "--efficiency.precision", "fp32"),
        *("--contestants", *contestants),
    ]
    unicl_bench.main(options)
    start, *found = json.loads((tmp_path / "race/race.json").read_text())["runs"]
    assert (start["contestant"], start["images"], start["cpu_seconds"]) == ("before training", 0, 0)
    assert len(found) == len(contestants)
    for run in found:
        assert (run["scores"], run["images"]) == (start["scores"], 16)
        assert run["cpu_seconds"] > 0


def test_a_peer_that_needs_a_start_is_refused_without_one(packed, tmp_path):
    options = ["race", "--train", str(packed["both"]), "--test", str(packed["both"])]
    options += ["--out", str(tmp_path / "race"), "--contestants", "sentence_transformers: x"]
    assert "add --init MODEL" in refusal_of(unicl_bench, *options)
