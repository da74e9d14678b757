"""Stored teachers: what training is fed is what the teacher says of the very pixels it is shown."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from program_runs import SMALL, call, losses, run
from small_runs import tiny_config
from torch.nn import functional as F

from unicl_fast.config import DataConfig, ObjectiveConfig, TrainConfig
from unicl_fast.conversion.export import write_export
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.teacher_files import read_facts, read_teacher
from unicl_fast.evaluation import reinforce as module
from unicl_fast.evaluation.features import encode_images, encode_token_rows
from unicl_fast.evaluation.reinforce import load_teacher, reinforce
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.tools import ledger, pretrain
from unicl_fast.tools.pack import __main__ as pack
from unicl_fast.training.data import adapt_objective_to_data, build_prompts

pytestmark = pytest.mark.dali

VIEWS = DataConfig(image_size=32, evaluation_resize=32, augment=("unicl,blur=0.5",))
STORE = {"num_views": 3, "views": VIEWS, "seed": 5, "batch_size": 7, "progress": False}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Exports of models that were not trained: one with texts, one of images alone."""
    folder = tmp_path_factory.mktemp("teachers")
    config = tiny_config(precision="fp32")
    write_export(UniCL(config), folder / "texts")
    alone = dataclasses.replace(config, objective=ObjectiveConfig(name="supcon"))
    write_export(UniCL(alone), folder / "images")
    return {name: str(folder / name) for name in ("texts", "images")}


@pytest.fixture
def packed(data: Path, tmp_path: Path) -> list[Path]:
    """Copies of a data set with labels and one with captions."""
    names = ("labels", "captions")
    return [Path(shutil.copytree(data / name, tmp_path / name)) for name in names]


def config_of(*folders: Path, **data: object) -> TrainConfig:
    views = dataclasses.replace(VIEWS, train=tuple(map(str, folders)), **data)
    objective = ObjectiveConfig(distillation="affinity")
    return dataclasses.replace(tiny_config(precision="fp32"), data=views, objective=objective)


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 255]))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_run_is_shown_what_the_teacher_saw_with_what_it_said(
    packed: list[Path], teachers: dict[str, str], kind: str
) -> None:
    """Of another seed and batch size, from both data sets at once, on two ranks."""
    said: list[str] = []
    for folder in packed:
        done = reinforce(str(folder), teacher=teachers[kind], say=said.append, **STORE)
        assert done.num_bytes > 0
        assert not done.was_complete
    assert "63 views of 21 images and" in said[0]
    assert " MB in " in said[0]
    assert reinforce(str(packed[0]), teacher=teachers[kind], say=said.append, **STORE).was_complete
    config = config_of(*packed)
    with PackedDataset(packed[0]) as labels, PackedDataset(packed[1]) as captions:
        datasets = [labels, captions]
        config = adapt_objective_to_data(config, datasets)
        model = load_teacher(teachers[kind], precision="fp32")
        width = 8 if kind == "texts" else model.image_encoder.num_features
        assert config.objective.teacher_width == width
        expected = float(model.logit_scale.detach().exp()) if kind == "texts" else 10
        assert config.objective.distillation_scale == pytest.approx(expected)
        prompts = build_prompts(datasets, config)
        loader = TrainLoader(config, datasets, None, prompts, rank=1, world_size=2)
        shown = set()
        for batch in itertools.islice(loader.batches(3), 12):
            layer = "projection" if kind == "texts" else "encoder"
            features = F.normalize(encode_images(model, batch.images, layer=layer), dim=1)
            torch.testing.assert_close(batch.teacher_images.float(), features, rtol=0, atol=1e-3)
            shown |= set(zip(*(one.tolist() for one in (batch.source_ids, batch.sample_ids)),
                             strict=True))  # fmt: skip
            if kind == "images":
                assert batch.teacher_texts is None
                continue
            pairs = zip(batch.tokens.numpy(), batch.text_lengths, strict=True)
            rows = [row[:length].astype(np.uint16) for row, length in pairs]
            texts = encode_token_rows(model, rows)
            torch.testing.assert_close(batch.teacher_texts.float(), texts, rtol=0, atol=1e-3)
        loader.close()
        assert len({source for source, _ in shown}) == 2
        teacher = read_teacher(labels, check=True)
        views = teacher.images.reshape(21, 3, -1).astype(np.float32)
        assert (np.ptp(views, axis=1).max(axis=1) > 0.01).all()  # the three differ
        assert np.linalg.norm(views, axis=2) == pytest.approx(1, abs=1e-3)


def test_what_was_stopped_resumes_with_the_same_bytes(
    packed: list[Path], teachers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of each file, with rows written that were not noted yet."""
    folder = packed[1]
    monkeypatch.setattr(module, "_TEXTS_AT_ONCE", 9)
    store = {"teacher": teachers["texts"], "say": lambda text: None, **STORE}
    reinforce(str(folder), **store)
    unbroken = files_of(folder / "teacher")
    assert set(unbroken) >= {"images.npy", "images.json", "captions.npy", "teacher.json"}
    shutil.rmtree(folder / "teacher")
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_NOTES", 0.0)
    writes, plain = [0, 0], module.RowsWriter.write

    def write(self: object, samples: np.ndarray, rows: np.ndarray) -> None:
        writes[0] += 1
        if writes[0] in (4, 8, 15):
            plain(self, samples[:2], rows[:2] + 1)
            raise KeyboardInterrupt
        writes[1] += len(samples)
        plain(self, samples, rows)

    monkeypatch.setattr(module.RowsWriter, "write", write)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt) as stopped:
            reinforce(str(folder), **store)
        assert "give the same command again" in stopped.value.__notes__[0]
        assert not (folder / "teacher").exists()
    reinforce(str(folder), **store)
    assert files_of(folder / "teacher") == unbroken
    assert not (folder / "teacher.partial").exists()
    with PackedDataset(folder) as dataset:  # nothing that was noted was made again
        assert writes[1] == 3 * len(dataset) + len(dataset.captions)


def test_an_image_that_cannot_be_read_has_no_features_and_is_replaced(
    packed: list[Path], teachers: dict[str, str]
) -> None:
    folder = packed[0]
    with PackedDataset(folder) as dataset:
        shard, offset = folder / dataset.shard_of(4), dataset.offset_of(4)
    sound = shard.read_bytes()
    flip_byte(shard, offset)
    done = reinforce(str(folder), teacher=teachers["images"], say=lambda text: None, **STORE)
    assert done.num_unreadable == 1
    shard.write_bytes(sound)
    config = config_of(folder)
    with PackedDataset(folder) as dataset:
        assert read_teacher(dataset).unreadable == {4}
        config = adapt_objective_to_data(config, [dataset])
        loader = TrainLoader(config, [dataset], None, build_prompts([dataset], config))
        batches = list(itertools.islice(loader.batches(0), 4))
        loader.close()
    assert any((batch.scheduled_ids == 4).any() for batch in batches)
    assert not any((batch.sample_ids == 4).any() for batch in batches)


def test_teachers_that_do_not_fit_are_refused(
    packed: list[Path], teachers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, captions = packed
    store = {"say": lambda text: None, **STORE}
    with PackedDataset(labels) as one, PackedDataset(captions) as other:

        def refused(*datasets: PackedDataset, match: str, **data: object) -> None:
            with pytest.raises(ValueError, match=match):
                adapt_objective_to_data(config_of(**data), datasets)

        refused(one, match=r"has no teacher's features: store them by unicl-pack reinforce")
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(labels)._replace(free=1000)
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            with pytest.raises(ValueError, match=r"features take .* and 0\.0 MB are free"):
                reinforce(str(labels), teacher=teachers["texts"], **store)
        reinforce(str(labels), teacher=teachers["texts"], **store)
        reinforce(str(captions), teacher=teachers["images"], **store)
        with pytest.raises(ValueError, match=r"holds features of .*texts or of other views"):
            reinforce(str(labels), teacher=teachers["images"], **store)
        refused(one, other, match=r"has features of the teacher .*images, and .*texts")
        refused(one, crop_scale=(0.5, 1.0), match=r"crop_scale \[0\.08, 1\.0\] and not \[0\.5")
        refused(one, augment=("unicl",), match=r"Set data\.augment so")
        refused(one, image_size=28, match=r"image_size 32 and not 28")  # it is erased and blurred
        shutil.rmtree(captions / "teacher")
        shutil.copytree(labels / "teacher", captions / "teacher")
        refused(other, match="is of other images or texts than the data set")
        config = config_of()
        wide = dataclasses.replace(config.objective, teacher_width=5)
        with pytest.raises(ValueError, match="teacher_width is 5, but the teacher"):
            adapt_objective_to_data(dataclasses.replace(config, objective=wide), [one])


def test_views_that_are_crops_alone_may_be_seen_larger_by_the_teacher(
    packed: list[Path], teachers: dict[str, str]
) -> None:
    crops = dataclasses.replace(VIEWS, augment=())
    store = STORE | {"views": crops, "image_size": 48, "say": lambda text: None}
    reinforce(str(packed[1]), teacher=teachers["texts"], **store)
    assert read_facts(packed[1] / "teacher")["views"]["image_size"] == 48
    with PackedDataset(packed[1]) as dataset:
        adapt_objective_to_data(config_of(augment=()), [dataset])


def test_verify_compares_a_teachers_checksums(
    packed: list[Path], teachers: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    reinforce(str(packed[0]), teacher=teachers["texts"], say=lambda text: None, **STORE)
    call(pack, "verify", packed[0])
    flip_byte(packed[0] / "teacher" / "prompts.npy", 300)
    with pytest.raises(SystemExit):
        call(pack, "verify", packed[0])
    assert "the stored features" in "".join(capsys.readouterr())


SETTINGS = [
    *(*SMALL, "--efficiency.precision", "fp32", "--run.trackers", "--ledger"),
    *("--objective.distillation", "affinity"),
]


def views_of(teacher: str, *, views: int) -> list[str]:
    """Options of `unicl-pack reinforce`, whose views are those of `SMALL`."""
    return [
        *("--teacher", teacher, "--views", str(views), "--image-size", "32", "--batch-size", "5"),
        *("--crop-scale", "0.6", "1.0", "--crop-ratio", "0.9", "1.1", "--flip-probability", "0"),
    ]


@pytest.mark.slow
def test_the_program_is_killed_and_resumes_with_the_same_bytes(
    packed: list[Path], teachers: dict[str, str]
) -> None:
    folder = packed[1]
    command = ["reinforce", str(folder), *views_of(teachers["texts"], views=40)]
    program = [sys.executable, "-m", "unicl_fast.tools.pack", *command]
    killed = subprocess.Popen(program)
    progress = folder / "teacher.partial" / "progress.json"
    while not progress.exists() or '"images":' not in progress.read_text():
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (folder / "teacher").exists()
    call(pack, *command)
    found = files_of(folder / "teacher")
    shutil.rmtree(folder / "teacher")
    call(pack, *command)
    assert files_of(folder / "teacher") == found


@pytest.mark.slow
@pytest.mark.dist
def test_runs_with_a_teacher_resume_on_other_ranks_with_their_ledger(
    packed: list[Path], teachers: dict[str, str]
) -> None:
    folder, out = packed[1], packed[1].parent / "one"
    command = ["reinforce", str(folder), *views_of(teachers["texts"], views=3)]
    call(pack, *command)
    train = [*SETTINGS, "--data.train", str(folder)]
    call(pretrain, *train, "--out", out)
    expected = losses(out)
    last = out / "checkpoints" / "step-00000012" / "model.safetensors"
    unbroken = last.read_bytes()

    def lose_the_end() -> None:
        for checkpoint in (out / "checkpoints").iterdir():
            if checkpoint.name > "step-00000006":
                shutil.rmtree(checkpoint)

    lose_the_end()
    call(pretrain, *train, "--out", out, "--resume", "auto")
    assert last.read_bytes() == unbroken
    assert losses(out) == expected
    lose_the_end()
    run("pretrain", *train, "--out", out, "--resume", "auto", "--nproc", "2")
    assert losses(out) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SystemExit) as ended:
        call(ledger, out)
    assert ended.value.code == 0
    shutil.rmtree(folder / "teacher")
    call(pack, *command, "--seed", "1")
    lose_the_end()
    with pytest.raises(SystemExit) as ended:
        call(pretrain, *train, "--out", out, "--resume", "auto")
    assert ended.value.code == 2
