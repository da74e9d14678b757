"""The chaos run as a test: short among the slow ones, in full among the long ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dali, pytest.mark.dist]


def run_chaos(
    folder: Path,
    *more: str,
    kills: int,
    checkpoint_kills: int,
    damage: str,
    ranks: int = 0,
) -> dict:
    report = folder / "report.json"
    done = subprocess.run(
        [
            *(
                sys.executable,
                Path(__file__).parents[1] / "helpers" / "chaos_run.py",
                "--out",
                folder / "chaos",
            ),
            *("--kills", str(kills), "--checkpoint-kills", str(checkpoint_kills)),
            *("--damage", damage, "--ranks", str(ranks), "--json", report, *more),
        ],
        capture_output=True,
        text=True,
    )
    assert report.is_file(), done.stderr[-4000:]
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["faults"] == []
    assert done.returncode == 0
    assert found["kills"] == kills
    assert found["samples_lost"] == found["scheduled_twice_in_an_epoch"] == 0
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_in_stages_that_is_killed_four_times_loses_nothing(tmp_path: Path) -> None:
    run_chaos(tmp_path, "--stages", kills=4, checkpoint_kills=1, damage="before")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_on_one_rank_it_equals_the_unbroken_run_bit_for_bit(tmp_path: Path) -> None:
    report = run_chaos(tmp_path, kills=5, checkpoint_kills=2, damage="before", ranks=1)
    assert report["largest_difference_of_weights"] == report["largest_difference_of_losses"] == 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("damage", ["before", "midway"])
def test_a_run_that_is_killed_twenty_times_loses_nothing(tmp_path: Path, damage: str) -> None:
    report = run_chaos(tmp_path, kills=20, checkpoint_kills=8, damage=damage)
    assert report["kills_while_a_checkpoint_was_written"] >= 5
    assert report["rank_changes"] >= 4
    assert report["mean_steps_between_kills"] >= 10
