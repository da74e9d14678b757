"""`unicl-pretrain` on spoilt data, as a user runs it."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flip_byte, store, undecodable

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.tools import pretrain
from unicl_fast.tools.pack import __main__ as pack_dataset
from unicl_fast.training.metrics import read_metrics

pytestmark = [pytest.mark.dali, pytest.mark.slow]

NUM_SAMPLES = 40
SETTINGS = [
    *("--preset", "digits-small", "--model.image-encoder", "test_vit", "--data.image-size", "32"),
    *("--data.evaluation-resize", "32", "--model.text-width", "16", "--run.device", "cpu"),
    *("--run.global-batch-size", "8", "--run.samples", "0", "--run.steps", "10"),
    *("--run.log-every-steps", "1", "--run.evaluate-every-steps", "0"),
]


@pytest.fixture(scope="module")
def sound(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 CIFAR-10 images in several shards."""
    folder = tmp_path_factory.mktemp("data")
    archive = zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip")
    wanted = tuple(f"000{number}.jpg" for number in range(1, 5))
    names = [name for name in archive.namelist() if name.endswith(wanted)]
    assert len(names) == NUM_SAMPLES
    for name in names:
        archive.extract(name, folder / "classes")
    arguments = ["build", folder / "classes", "--out", folder / "packed", "--shard-bytes", "12000"]
    pack_dataset.main([str(argument) for argument in arguments])
    return folder / "packed"


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "packed"))


@pytest.fixture
def train(
    data: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the program in this process, which has imported everything; gives what it said."""

    def run(out: Path, *more: str, expect: int = 0) -> str:
        caplog.clear()
        arguments = [*SETTINGS, "--data.train", str(data), "--out", str(out), *more]
        with pytest.raises(SystemExit) if expect else contextlib.nullcontext() as stopped:
            pretrain.main(arguments)
        assert not expect or stopped.value.code == expect
        return caplog.text + capsys.readouterr().err

    return run


def bad_samples(run: Path) -> list[float]:
    return [line["replaced_samples"] for line in read_metrics(run) if "loss" in line]


def keys_in_quarantine(run: Path) -> list[int]:
    with (run / "quarantine.csv").open(newline="") as file:
        return sorted(int(row["key"]) for row in csv.DictReader(file))


@pytest.mark.dist
def test_a_run_over_spoilt_samples_ends_well_on_one_rank_and_on_two(
    data: Path, train: Callable[..., str], tmp_path: Path
) -> None:
    flip_byte(data, 3)
    flip_byte(data, 12)
    store(data, 25, undecodable("html"))
    errors = train(tmp_path / "one", "--efficiency.precision", "fp64")
    assert errors.count("BAD SAMPLE") == 3
    counts = bad_samples(tmp_path / "one")
    assert counts == sorted(counts)
    assert counts[4] == 3  # a pass over 40 samples in batches of 8
    assert counts[9] == 6
    assert keys_in_quarantine(tmp_path / "one") == [3, 12, 25]
    subprocess.run(
        [
            *(sys.executable, "-m", "unicl_fast.tools.pretrain", *SETTINGS, "--nproc", "2"),
            *("--efficiency.precision", "fp64"),
            *("--data.train", str(data), "--out", str(tmp_path / "two")),
        ],
        check=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert bad_samples(tmp_path / "two") == counts
    assert keys_in_quarantine(tmp_path / "two") == [3, 12, 25]
    one, two = (
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-10)


def test_missing_shards_are_tolerated_up_to_the_limit_and_refused_beyond_it(
    data: Path, train: Callable[..., str], tmp_path: Path
) -> None:
    shards = Manifest.load(data).shards
    assert len(shards) > 3
    train(tmp_path / "run", "--run.steps", "5")
    (data / shards[1].name).unlink()
    first = shards[0].num_samples
    lost = list(range(first, first + shards[1].num_samples))
    refused = train(tmp_path / "refused", expect=2)
    assert f"{shards[1].name} is missing" in refused
    part = f"with the images of {len(lost)} of 40 samples"
    assert f"{part}: more than data.max_bad_fraction = 0.01" in refused
    assert not (tmp_path / "refused").exists()
    errors = train(tmp_path / "run", "--data.max-bad-fraction", "0.5", "--resume", "auto")
    assert "DAMAGED DATA SET" in errors
    assert bad_samples(tmp_path / "run") == sorted(bad_samples(tmp_path / "run"))
    assert bad_samples(tmp_path / "run")[-1] == len(lost)
    listed = keys_in_quarantine(tmp_path / "run")
    assert listed == lost
