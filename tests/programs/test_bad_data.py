"""`unicl-pretrain` on spoilt data, as a user runs it."""

import csv
import os
import stat
import zipfile
from pathlib import Path

import pytest
from damage import flip_byte, store, undecodable
from program_runs import SMALL, call, losses, run

from unicl_fast.tools import pretrain
from unicl_fast.tools.pack import __main__ as pack_dataset
from unicl_fast.training.metrics import read_metrics

pytestmark = [pytest.mark.dali, pytest.mark.slow]

SETTINGS = [*SMALL, "--run.steps", "10", "--checkpoint.every-steps", "100"]


@pytest.fixture
def data(shared_data: Path, tmp_path: Path) -> Path:
    """40 CIFAR-10 images in several shards."""
    folder = tmp_path / "data"
    archive = zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip")
    wanted = tuple(f"000{number}.jpg" for number in range(1, 5))
    names = [name for name in archive.namelist() if name.endswith(wanted)]
    for name in names:
        archive.extract(name, folder / "classes")
    shards = ["--shard-bytes", "12000"]
    call(pack_dataset, "build", folder / "classes", "--out", folder / "packed", *shards)
    return folder / "packed"


def test_a_run_over_spoilt_samples_ends_well_on_one_rank_and_on_two(data, tmp_path, caplog):
    flip_byte(data, 3)
    flip_byte(data, 12)
    store(data, 25, undecodable("html"))
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*SETTINGS, "--efficiency.precision", "fp64", "--data.train", data]
    umask = os.umask(0o002)
    call(pretrain, *arguments, "--out", one)
    os.umask(umask)
    assert caplog.text.count("BAD SAMPLE") == 3
    # what a group may do with other files of this umask it may do with those of a run
    for path in one.rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) & 0o060 == 0o060, path
    run("pretrain", *arguments, "--out", two, "--nproc", "2")
    for out in (one, two):
        counts = [line["replaced_samples"] for line in read_metrics(out) if "loss" in line]
        assert counts == sorted(counts)
        assert (counts[4], counts[9]) == (3, 6)  # an epoch is 40 samples in batches of 8
        rows = csv.DictReader((out / "quarantine.csv").read_text().splitlines())
        assert sorted(int(row["key"]) for row in rows) == [3, 12, 25]
    assert losses(two) == pytest.approx(losses(one), rel=1e-10)
