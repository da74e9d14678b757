"""The programs as a user runs them, on real pictures: train, kill, resume, two ranks, evaluate."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from unicl_fast.checkpoint import list_checkpoints
from unicl_fast.config import TrainConfig
from unicl_fast.metrics import read_metrics
from unicl_fast.tools import evaluate, pack_dataset, pretrain

pytestmark = pytest.mark.dali

STEPS = 12
SMALL = [
    *("--preset", "digits-small", "--model.image-encoder", "test_vit", "--data.image-size", "32"),
    *("--data.evaluation-resize", "32", "--model.drop-path", "0.2", "--model.text-width", "16"),
    *("--run.global-batch-size", "8", "--run.samples", "0", "--run.steps", str(STEPS)),
    *("--run.log-every-steps", "1", "--run.evaluate-every-steps", "0", "--run.device", "cpu"),
    *("--checkpoint.every-steps", "2", "--checkpoint.keep", "0"),
]


def run(program: str, *arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", f"unicl_fast.tools.{program}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def call(program: ModuleType, *arguments: str | Path) -> None:
    """In this process, which has imported everything already."""
    program.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 pictures as class folders and packed, and captioned photographs packed."""
    folder = tmp_path_factory.mktemp("data")
    archive = zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip")
    names = [name for name in archive.namelist() if name.endswith(("0001.jpg", "0002.jpg"))]
    names += [name for name in archive.namelist() if name.endswith("cat/0003.jpg")]
    for name in names:
        archive.extract(name, folder / "classes")
    lines = (shared_data / "captions" / "flickr8k" / "captions.jsonl").read_text().splitlines()
    (folder / "list.jsonl").write_text("\n".join(lines[:20]))
    call(pack_dataset, "build", folder / "classes", "--out", folder / "labels")
    call(
        *(pack_dataset, "build", folder / "list.jsonl", "--out", folder / "captions"),
        *("--image-root", shared_data / "captions" / "flickr8k"),
    )
    return folder


@pytest.fixture(scope="module")
def unbroken(data: Path) -> Path:
    out = data / "unbroken"
    run("pretrain", *SMALL, "--data.train", data / "labels", data / "captions", "--out", out)
    return out


def losses(run_folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_folder) if "loss" in line]


def weights(run_folder: Path) -> bytes:
    newest = list_checkpoints(run_folder / "checkpoints")[-1]
    return (newest / "model.safetensors").read_bytes()


def test_a_run_leaves_what_the_readme_promises(unbroken: Path) -> None:
    assert len(losses(unbroken)) == STEPS
    assert Image.open(unbroken / "contact-sheet.png").size[0] > 300
    assert Image.open(unbroken / "curves.png").size[0] > 300
    config = json.loads((unbroken / "config.json").read_text())
    assert config["model"]["image_encoder"] == "test_vit"


def test_killed_and_resumed_it_equals_the_unbroken_run_bit_for_bit(
    data: Path, unbroken: Path
) -> None:
    out = data / "killed"
    arguments = [*SMALL, "--data.train", data / "labels", data / "captions", "--out", out]
    process = start(*arguments)
    deadline = time.monotonic() + 120
    while not list_checkpoints(out / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    newest = list_checkpoints(out / "checkpoints")[-1]
    assert newest.name < f"step-{STEPS:08d}"
    refused = run("pretrain", *arguments, expect=2)
    assert "--resume auto" in refused.stderr
    run("pretrain", *arguments, "--resume", "auto")
    assert losses(out) == losses(unbroken)
    assert weights(out) == weights(unbroken)


LONG = [word.replace(str(STEPS), "100000") if word == str(STEPS) else word for word in SMALL]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "unicl_fast.tools.pretrain", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # a shell that starts tests behind itself lets its children ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    STARTED.append(process)
    return process


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()  # its ranks end with it
        process.wait()


def start_long_run(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """A run of two ranks that is training and has written a checkpoint."""
    sources = ["--data.train", data / "labels", data / "captions"]
    process = start(*LONG, *sources, "--out", out, *more)
    deadline = time.monotonic() + 120
    while not list_checkpoints(out / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    return process


def processes_of(out: Path) -> dict[int, str]:
    """Process id -> RANK ("" for the launcher) of all that train into a folder."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words:
            rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), b"")
            found[int(folder.name)] = rank.decode()
    return found


def wait_until_gone(out: Path) -> None:
    deadline = time.monotonic() + 40
    while processes_of(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(out)


@pytest.mark.dist
@pytest.mark.parametrize("nproc", ["1", "2"])
def test_a_run_that_is_asked_to_stop_saves_and_ends_with_75(
    data: Path, tmp_path: Path, nproc: str
) -> None:
    process = start_long_run(data, tmp_path / "run", "--nproc", nproc)
    process.send_signal(signal.SIGUSR1 if nproc == "2" else signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors[-3000:]
    assert "go on with --resume auto" in errors
    assert "Traceback" not in errors
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert f"after step {int(newest.name[5:])} of" in errors
    wait_until_gone(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_goes_on_with_any_number_of_ranks(data: Path, tmp_path: Path) -> None:
    """300 steps in fp64, with augmentation and drop path: stopped three times, on other ranks."""
    steps = 300
    settings = [
        *[word if word != str(STEPS) else str(steps) for word in SMALL],
        *("--run.global-batch-size", "12", "--data.flip-probability", "0.5"),
        *("--efficiency.precision", "fp64", "--checkpoint.every-steps", "5"),
        *("--data.train", data / "labels", data / "captions", "--resume", "auto"),
    ]
    call(pretrain, *settings, "--out", tmp_path / "unbroken")
    out = tmp_path / "elastic"
    started = [0]
    for nproc in (1, 2, 3):
        process = start(*settings, "--out", out, "--nproc", str(nproc))
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            found = list_checkpoints(out / "checkpoints")
            if found and int(found[-1].name[5:]) >= started[-1] + 40:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors[-3000:]
        started.append(int(list_checkpoints(out / "checkpoints")[-1].name[5:]))
    run("pretrain", *settings, "--out", out, "--nproc", "4")
    assert started == sorted(set(started))
    assert started[-1] < steps
    lines = [line for line in read_metrics(out) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert losses(out) == pytest.approx(losses(tmp_path / "unbroken"), rel=1e-9)


@pytest.mark.dist
def test_two_ranks_follow_one(data: Path, unbroken: Path) -> None:
    out = data / "two"
    run(
        *("pretrain", *SMALL, "--data.train", data / "labels", data / "captions", "--out", out),
        *("--efficiency.precision", "fp64", "--nproc", "2"),
    )
    alone = data / "alone"
    call(
        *(pretrain, *SMALL, "--data.train", data / "labels", data / "captions", "--out", alone),
        *("--efficiency.precision", "fp64"),
    )
    assert losses(out) == pytest.approx(losses(alone), rel=1e-10)


@pytest.mark.dist
def test_wrong_input_ends_with_2_before_ranks_are_started(data: Path) -> None:
    done = run(
        *("pretrain", *SMALL, "--data.train", data / "labels", "--out", data / "three"),
        *("--nproc", "3"),
        expect=2,
    )
    assert "set run.global_batch_size to 6 or 9" in done.stderr


@pytest.fixture(scope="module")
def packed_result(data: Path, unbroken: Path) -> dict:
    return zero_shot(unbroken, data / "labels", data / "packed.json")


def zero_shot(checkpoint: Path, source: Path, path: Path, *more: str, nproc: int = 1) -> dict:
    arguments = ["--checkpoint", checkpoint, "--data", source, "--json", path, "--device", "cpu"]
    if nproc == 1:
        call(evaluate, "zero-shot", *arguments, *more)
    else:
        run("evaluate", "zero-shot", *arguments, *more, "--nproc", str(nproc))
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("source", "nproc", "more"),
    [
        ("classes", 1, []),
        pytest.param("classes", 2, ["--batch-size", "3"], marks=pytest.mark.dist),
    ],
    ids=["class folders", "class folders on ranks"],
)
def test_zero_shot_is_the_same_packed_from_a_folder_and_on_two_ranks(
    data: Path,
    unbroken: Path,
    packed_result: dict,
    tmp_path: Path,
    source: str,
    nproc: int,
    more: list[str],
) -> None:
    assert packed_result["num_samples"] == 21
    assert packed_result["num_classes"] == 10
    other = zero_shot(unbroken, data / source, tmp_path / "result.json", *more, nproc=nproc)
    for key in ("num_samples", "top1", "top5", "mean_per_class", "per_class"):
        assert other[key] == packed_result[key], key


def test_zero_shot_prints_a_table(
    data: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zero_shot(unbroken, data / "labels", tmp_path / "result.json")
    assert "top-1" in capsys.readouterr().out


def test_retrieval_reports_chance(data: Path, unbroken: Path, tmp_path: Path) -> None:
    path = tmp_path / "retrieval.json"
    call(
        *(evaluate, "retrieval", "--checkpoint", unbroken, "--data", data / "captions"),
        *("--json", path, "--device", "cpu"),
    )
    values = json.loads(path.read_text())
    assert (values["num_images"], values["num_captions"]) == (20, 100)
    assert values["text_to_image_recall_at_5_chance"] == pytest.approx(5 / 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "swin-tinny", "--out", "x"], "presets are swin-tiny"),
        ([*SMALL, "--out", "x"], "give --data.train DIR"),
        ([*SMALL, "--out", "x", "--data.train", "nowhere"], "nowhere"),
        ([*SMALL, "--out", "x", "--data.train", "{labels}=0.5", "{captions}"], "or none"),
        ([*SMALL, "--out", "x", "--data.train", "{labels}", "--run.global-batch-size", "64"], "21"),
        ([*SMALL, "--out", "x", "--model.context-length", "20", "--data.train", "{labels}"], "77"),
        ([*SMALL, "--out", "x", "--data.train", "{labels}=many"], "no number behind its ="),
        ([*SMALL, "--out", "x", "--nproc", "0"], "at least 1, not 0"),
        (
            [
                *(*SMALL, "--out", "x", "--nproc", "2", "--data.train", "{labels}"),
                *("--data.evaluate", "nowhere"),
            ],
            "nowhere is not a packed data set",
        ),
    ],
    ids=[
        *("preset", "no data", "no such data", "half the shares", "too few samples", "context"),
        *("no share", "no ranks", "no data to evaluate"),
    ],
)
def test_wrong_input_ends_with_2_and_a_sentence(
    data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [
        word.replace("{labels}", str(data / "labels")).replace("{captions}", str(data / "captions"))
        for word in arguments
    ]
    with pytest.raises(SystemExit) as stopped:
        call(pretrain, *filled)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zero-shot", "--checkpoint", "nowhere", "--data", "{labels}", "--nproc", "2"], "nowhere"),
        (["retrieval", "--checkpoint", "{run}", "--data", "{labels}"], "has no captions"),
        (
            ["zero-shot", "--checkpoint", "{run}", "--data", "{labels}", "--batch-size", "0"],
            "not 0",
        ),
        (["zero-shot", "--checkpoint", "{run}", "--data", "{captions}"], "has no classes"),
    ],
    ids=["no checkpoint", "no captions", "no batch", "no classes"],
)
def test_what_cannot_be_evaluated_ends_with_2_and_a_sentence(
    data: Path,
    unbroken: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"labels": data / "labels", "captions": data / "captions", "run": unbroken}
    with pytest.raises(SystemExit) as stopped:
        call(evaluate, *(word.format(**places) for word in arguments))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "unicl_fast.tools.pretrain", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"torch", "timm", "nvidia.dali"}


def test_help_explains_every_setting() -> None:
    shown = " ".join(run("pretrain", "--help").stdout.replace("│", " ").split())
    for group in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(group.default_factory):
            assert f"--{group.name}.{field.name.replace('_', '-')}" in shown.replace(
                f"--{group.name}.no-", f"--{group.name}."
            ), field.name
    for words in ("DIR=SHARE", "cifar10-small", "Stochastic depth of the image encoder"):
        assert words in shown
    for words in ("zero-shot", "retrieval"):
        assert words in run("evaluate", "--help").stdout
