"""Runs whose ranks die and come back, or change in number; ledgers prove what they were fed."""

import json
import os
import signal
from pathlib import Path

import pytest
from compared_runs import losses_of
from program_runs import (
    SMALL,
    STEPS,
    call,
    processes_of,
    refusal_of,
    run,
    start,
    wait_for_step,
    wait_until_gone,
)
from safetensors.torch import load_file

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.tools import ledger, pretrain
from unicl_fast.training.metrics import read_metrics

pytestmark = [pytest.mark.dali, pytest.mark.slow]

STEPS_OF_A_RUN = 40
FP64 = [
    *[word if word != str(STEPS) else str(STEPS_OF_A_RUN) for word in SMALL],
    *("--run.global-batch-size", "12", "--efficiency.precision", "fp64", "--ledger"),
    *("--checkpoint.every-steps", "3", "--data.shuffle-window", "16"),
    *("--data.flip-probability", "0.5"),
]


def sources(data: Path) -> list[str | Path]:
    return ["--data.train", data / "labels", data / "captions"]


@pytest.fixture(scope="module")
def unbroken(data: Path) -> Path:
    out = data / "unbroken-fp64"
    run("pretrain", *FP64, *sources(data), "--out", out)
    return out


def proven(run_folder: Path, *more: str) -> dict:
    """The JSON of unicl-ledger for a proven run."""
    path = run_folder / "ledger.json"
    with pytest.raises(SystemExit) as stopped:
        call(ledger, run_folder, "--json", path, *more)
    assert stopped.value.code == 0
    return json.loads(path.read_text())


def assert_same_weights(one: Path, other: Path) -> None:
    newest = [list_checkpoints(out / "checkpoints")[-1] for out in (one, other)]
    assert newest[0].name == newest[1].name == f"step-{STEPS_OF_A_RUN:08d}"
    tensors = [load_file(folder / "model.safetensors") for folder in newest]
    for name, weight in tensors[0].items():
        # a key's bias changes no attention: AdamW enlarges the rounding that is its gradient
        rtol = 1e-6 if name.endswith("in_proj_bias") else 1e-9
        assert (weight - tensors[1][name]).abs().max() <= rtol * weight.abs().max(), name


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_killed_rank_comes_back_and_the_run_ends_as_if_nothing_had_been(
    data, unbroken, tmp_path, torchrun
):
    out, restarts = tmp_path / "run", ["--max-restarts", "2"]
    own = [] if torchrun else ["--nproc", "2", *restarts]
    process = start(
        *(*FP64, *sources(data), "--out", out, *own), torchrun=restarts if torchrun else None
    )
    wait_for_step(out, 6, process)
    (number,) = [pid for pid, rank in processes_of(out).items() if rank == "1"]
    os.kill(number, signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    if not torchrun:
        assert "RANK 1 WAS KILLED BY SIGKILL: starting all again, restart 1 of 2" in errors
    assert_same_weights(out, unbroken)
    assert losses_of(out) == pytest.approx(losses_of(unbroken), rel=1e-9)
    values = proven(out, "--replan")
    assert values["steps"] == STEPS_OF_A_RUN
    assert values["num_starts"] == 2
    assert values["segments"][1]["start_step"] >= 6
    assert values["num_different_from_plan"] == 0
    wait_until_gone(out)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("precision", "tolerance", "steps", "numbers"),
    [
        ("fp64", 1e-9, STEPS_OF_A_RUN, (1, 3)),
        pytest.param("fp64", 1e-9, 300, (1, 2, 3, 4), marks=pytest.mark.long),
        pytest.param("fp32", 1e-2, 300, (1, 2, 3, 4), marks=pytest.mark.long),
    ],
    ids=["short", "fp64", "fp32"],
)
def test_a_run_resumes_with_any_number_of_ranks(
    data, unbroken, tmp_path, precision, tolerance,
    steps, numbers,
):  # fmt: skip
    """With augmentation and drop path: stopped, and resumed on other ranks.

    The largest difference is printed (pytest -s), for docs/reliability.md.
    """
    *stopped, last = numbers
    settings = [*FP64, *sources(data), "--resume", "auto", "--run.steps", str(steps)]
    settings += ["--efficiency.precision", precision]
    if steps != STEPS_OF_A_RUN:
        unbroken = tmp_path / "unbroken"
        run("pretrain", *settings, "--out", unbroken)
    out = tmp_path / "elastic"
    started = [0]
    for nproc in stopped:
        process = start(*settings, "--out", out, "--nproc", str(nproc))
        wait_for_step(out, started[-1] + steps // 8, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 75, errors[-3000:]
        assert "resume with --resume auto" in errors
        assert "Traceback" not in errors
        started.append(int(list_checkpoints(out / "checkpoints")[-1].name[5:]))
    run("pretrain", *settings, "--out", out, "--nproc", str(last))
    assert started == sorted(set(started))
    assert started[-1] < steps
    lines = [line for line in read_metrics(out) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    pairs = list(zip(losses_of(out), losses_of(unbroken), strict=True))
    largest = max(abs(one - other) / abs(other) for one, other in pairs)
    print(f"{precision}: largest relative difference of {steps} losses {largest:.2e}")
    assert largest <= tolerance
    values = proven(out, "--replan")
    assert (values["steps"], values["num_starts"]) == (steps, len(numbers))
    assert values["num_changes_of_world_size"] == len(stopped)
    assert [segment["start_step"] for segment in values["segments"]] == started
    assert values["num_steps_done_twice"] == 0, "a run that is asked to stop loses nothing"


def test_unicl_ledger_names_missing_steps(unbroken, tmp_path, capsys):
    assert proven(unbroken)["sources"][0]["complete_epochs"] > 3
    assert "PROVEN: no step is missing" in capsys.readouterr().out
    broken = tmp_path / "run"
    (broken / "ledger").mkdir(parents=True)
    (broken / "checkpoints" / f"step-{STEPS_OF_A_RUN:08d}").mkdir(parents=True)
    (whole,) = (unbroken / "ledger").iterdir()
    (broken / "ledger" / whole.name).write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(SystemExit) as stopped:
        call(ledger, broken, "--json", tmp_path / "ledger.json")
    assert stopped.value.code == 1
    told = capsys.readouterr().out
    assert f"HOLE: step {STEPS_OF_A_RUN - 1} has no record of all ranks" in told
    assert "NOT PROVEN" in told
    holes = json.loads((tmp_path / "ledger.json").read_text())["holes"]
    assert holes == [[STEPS_OF_A_RUN - 1, STEPS_OF_A_RUN]]


def test_a_missing_ledger_and_restarts_under_torchrun_are_refused(data, tmp_path, monkeypatch):
    assert "trained with --ledger" in refusal_of(ledger, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    words = [*FP64, *sources(data), "--out", tmp_path / "run", "--max-restarts", "1"]
    assert "give it to torchrun" in refusal_of(pretrain, *words)
