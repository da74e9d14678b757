"""The programs as a user runs them, on real images: train, kill, resume, two ranks, evaluate."""

import dataclasses
import json
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from compared_runs import losses_of
from PIL import Image
from program_runs import SMALL, STEPS, call, evaluated, refusal_of, run, start

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.checkpoints.load import read_state
from unicl_fast.config import TrainConfig
from unicl_fast.system.atomic_files import sole_writer
from unicl_fast.tools import pretrain
from unicl_fast.tools.evaluate import __main__ as evaluate
from unicl_fast.training.metrics import read_metrics

pytestmark = pytest.mark.dali


@pytest.fixture(scope="module")
def unbroken(data: Path) -> Path:
    out = data / "unbroken"
    (data / "held-out").symlink_to("labels")
    level = logging.root.level
    logging.root.setLevel(logging.INFO)  # pytest's handlers keep a program from doing so
    sets = ("--data.train", data / "labels", data / "captions")
    umask = os.umask(0o002)
    call(pretrain, *SMALL, *sets, "--out", out, draws=True)
    os.umask(umask)
    logging.root.setLevel(level)
    return out


def test_a_run_leaves_the_files_and_lines_of_the_readme(unbroken):
    assert len(losses_of(unbroken)) == STEPS
    assert Image.open(unbroken / "contact-sheet.png").size[0] > 300
    assert Image.open(unbroken / "curves.png").size[0] > 300
    config = json.loads((unbroken / "config.json").read_text())
    assert config["model"]["image_encoder"] == "test_vit"
    log = (unbroken / "log.txt").read_text()
    held_out = unbroken.parent / "held-out"
    assert "settings: the preset digits-small\n" in log
    assert "labels: 21 images, 10 classes; 51.2% of each batch, 2.3 epochs" in log
    assert "captions: 20 images, captions only; 48.8% of each batch" in log
    assert f"0 of {STEPS} steps done; 8 images a step at 32 pixels, 1 rank of 8 each" in log
    next_one = f"Next: unicl-eval zero-shot --checkpoint {unbroken} --data {held_out}"
    assert f"{STEPS} steps done. {next_one}" in log
    # what a group may do with other files of this umask it may do with those of a run
    for path in unbroken.rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) & 0o060 == 0o060, path


def test_a_dry_run_does_all_that_comes_before_the_first_step_and_writes_nothing(
    data, unbroken, tmp_path, caplog
):
    caplog.set_level("INFO")
    out = tmp_path / "run"
    call(pretrain, *SMALL, "--data.train", data / "labels", "--out", out, "--dry-run")
    assert not out.exists()
    assert f"run: 0 of {STEPS} steps done" in caplog.text
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    call(pretrain, "--out", unbroken, "--resume", "auto", "--dry-run")
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before
    assert f"run: {STEPS} of {STEPS} steps done" in caplog.text
    assert caplog.text.count("nothing was trained or written") == 2
    words = ["--data.train", data / "labels", "--out", unbroken, "--dry-run"]
    assert "--resume auto" in refusal_of(pretrain, *SMALL, *words)


@pytest.mark.slow
def test_captions_are_evaluated_in_training_as_unicl_eval_does(data, tmp_path):
    out = tmp_path / "run"
    sets = ["--data.evaluate", data / "captions", data / "labels"]
    exact = ("--efficiency.precision", "fp32")  # features of ten steps nearly tie
    call(pretrain, *SMALL, *exact, "--data.train", data / "captions", *sets, "--out", out)
    (seen,) = [line for line in read_metrics(out) if "retrieval/captions/loss" in line]
    assert seen["step"] == STEPS
    assert 0 < seen["retrieval/captions/loss"] < 10
    assert any("zero_shot/labels/top1" in line for line in read_metrics(out))
    assert (out / "checkpoints" / "best.json").is_file()
    found = evaluated("retrieval", out, "--data", data / "captions")
    for name in ("image_to_text", "text_to_image"):
        for key in (f"{name}_recall_at_{k}" for k in (1, 5, 10)):
            assert seen[f"retrieval/captions/{key}"] == found[key], key
    two = tmp_path / "two"
    quiet = run(
        *("pretrain", *SMALL, "--data.train", data / "labels", *sets[:2], "--out", two),
        *("--nproc", "2", "--checkpoint.best", "retrieval/captions/text_to_image_recall_at_5"),
        "--quiet",
    )
    assert quiet.stderr == quiet.stdout == ""
    assert any("retrieval/captions/recall_at_1" in line for line in read_metrics(two))
    # there are no classes to tell apart
    next_one = f"Next: unicl-eval retrieval --checkpoint {two} --data {sets[1]}"
    lines = (two / "log.txt").read_text().splitlines()
    assert f"{STEPS} steps done. {next_one}" in lines[-1]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d I ", line) for line in lines)


def test_a_run_folder_has_one_writer(unbroken):
    """As when a scheduler starts a job again beside its own zombie."""
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    more = ["--run.seed", "7", "--resume", "auto"]
    with sole_writer(unbroken):
        refused = refusal_of(pretrain, "--out", unbroken, *more)
    assert refused.count("is being written by process") == 1
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.exists())


@pytest.mark.slow
def test_ranks_that_disagree_end_before_the_first_step(data, tmp_path):
    """Other differences: tests/training/test_agreement.py."""
    out = tmp_path / "run"
    train = ["--data.train", str(data / "labels"), str(data / "captions")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank, more in enumerate(([], ["--run.seed", "7"])):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(start(*SMALL, *train, "--out", out, *more, env=env))
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], errors
    said = "unicl-pretrain: ranks disagree: run.seed is 0 on rank 0 and 7 on rank 1"
    assert said in errors[0]
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.slow
def test_auto_keeps_its_meaning_when_a_run_is_resumed(data, tmp_path):
    """A run that began in fp64 resumes in fp64, even if this machine prefers another precision."""
    arguments = [*SMALL, "--data.train", data / "labels", "--out", tmp_path / "run"]
    call(pretrain, *arguments, "--efficiency.precision", "fp64", "--run.steps", "4")
    call(pretrain, *arguments, "--efficiency.precision", "auto", "--resume", "auto")
    (*_, newest) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert read_state(newest).config.efficiency.precision == "fp64"
    assert len(losses_of(tmp_path / "run")) == STEPS


def test_a_checkpoint_of_another_run_is_refused_and_the_difference_shown(data, unbroken, tmp_path):
    """Other differences: tests/system/test_wording.py and tests/training/test_trainer.py."""
    manifest = json.loads((data / "labels" / "manifest.json").read_text())
    names = ["tomcat" if name == "cat" else name for name in manifest["class_names"]]
    renamed = shutil.copytree(data / "labels", tmp_path / "renamed")
    (renamed / "manifest.json").write_text(json.dumps(manifest | {"class_names": names}))
    (renamed / "checksums.txt").unlink()  # as of a data set that was packed so
    said = refusal_of(
        *(pretrain, *SMALL, "--out", tmp_path / "run", "--resume", unbroken),
        *("--data.train", renamed, data / "captions"),
    )
    assert "class_names[0][3] was 'cat' and is now 'tomcat'" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset swin-tinny --out x", "presets are swin-tiny"),
        ("SMALL --out x", "give --data.train DIR"),
        ("SMALL --out x --data.train nowhere", "nowhere"),
        ("SMALL --out x --data.train {labels}=0.5 {captions}", "or none"),
        ("SMALL --out x --data.train {labels} --run.global-batch-size 64", "21"),
        ("SMALL --out x --data.train {labels}=many", "must be a number"),
        ("--out nowhere --resume auto", "nowhere holds no run to resume"),
        ("SMALL --out x --nproc 0", "at least 1, not 0"),
        ("SMALL --out x --nproc 2 --data.train {labels} --data.evaluate nowhere",
         "nowhere is not a packed data set"),
        ("SMALL --out x --nproc 3 --data.train {labels}", "set run.global_batch_size to 6 or 9"),
    ],
)  # fmt: skip
def test_wrong_input_ends_with_2_and_a_sentence(data, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # not where another process's case has its run, too
    words = arguments.format(labels=data / "labels", captions=data / "captions").split()
    small = SMALL if words[0] == "SMALL" else []
    assert message in refusal_of(pretrain, *small, *words[bool(small) :])


def test_a_missing_checkpoint_ends_ranks_before_they_start(data, unbroken):
    words = ("--checkpoint", f"{unbroken}x", "--data", data / "labels", "--nproc", "2")
    said = refusal_of(evaluate, "zero-shot", *words)
    assert f"there is no such folder; {unbroken} is there" in said


def test_a_removed_current_folder_is_reported(tmp_path):
    """tests/programs/test_doctor.py has the other programs."""
    gone = tmp_path / "gone"
    gone.mkdir()

    def remove_and_stay() -> None:
        os.chdir(gone)
        gone.rmdir()

    done = run("pretrain", "--data.train", "x", "--out", "y", expect=2, preexec_fn=remove_and_stay)
    assert "the current directory was removed or replaced" in done.stderr
    assert "Traceback" not in done.stderr


# Every mount but the test's folder becomes read-only, for this process and its children.
READ_ONLY = """
mount --make-rprivate / && mount --bind "$1" "$1"
awk '{print $5}' /proc/self/mountinfo | while read -r place; do
    [ "$place" = "$1" ] || mount -o remount,bind,ro "$place" 2> /dev/null
done
shift && exec "$@"
"""


@pytest.mark.long
def test_a_read_only_machine_trains_and_evaluates(data, tmp_path):
    """Programs write into --out and the temporary folder alone, not into home or installation."""
    alone = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(tmp_path)]
    probe = f"touch /probe 2> /dev/null && exit 1; touch {tmp_path}/probe"
    if subprocess.run([*alone, "sh", "-c", probe], check=False).returncode:
        pytest.skip("this user may not make a machine's mounts read-only for a process")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {key: value for key, value in os.environ.items() if "CACHE" not in key}
    environment |= {"HOME": "/nonexistent", "TMPDIR": str(temporary)}

    def run_there(program: str, *words: str | Path) -> str:
        return run(program, *words, before=alone, cwd="/", env=environment).stderr

    out = tmp_path / "run"
    labels = ("--data.train", data / "labels")
    said = run_there("pretrain", *SMALL, *labels, "--out", out)
    assert said.count("set NUMBA_CACHE_DIR") == 1
    assert len(losses_of(out)) == STEPS
    run_there("pretrain", *SMALL, *labels, "--out", tmp_path / "two", "--nproc", "2")
    run_there("evaluate", "zero-shot", "--checkpoint", out, "--data", data / "labels")


def test_the_short_help_shows_the_preset_and_help_all_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        call(pretrain, "--preset", "cifar10-small", "-h")
    assert not stopped.value.code
    shown = capsys.readouterr().out
    for words in ("--data.image-size 28 ", "DIR=WEIGHT", "digits-small", "--help-all", "examples:"):
        assert words in shown
    for program, option in ((pretrain, "--help-all"), (evaluate, "--help")):
        with pytest.raises(SystemExit):
            call(program, option)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("DIR=WEIGHT", "cifar10-small", "Stochastic depth of the image enc", "retrieval"):
        assert words in shown
    shown = re.sub(r"(--\w+\.)no-", r"\1", shown)
    for group in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(getattr(TrainConfig(), group.name)):
            assert f"--{group.name}.{field.name.replace('_', '-')}" in shown, field.name
