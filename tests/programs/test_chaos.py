"""The chaos run as a test: short among the slow ones, in full among the long ones."""

from pathlib import Path
from typing import Any

import chaos_run
import pytest

pytestmark = [pytest.mark.dali, pytest.mark.long]


def run_chaos(folder: Path, options: str) -> dict[str, Any]:
    report = chaos_run.run([*options.split(), "--out", str(folder / "chaos")])
    assert report["faults"] == []
    assert report["samples_lost"] == report["scheduled_twice_in_an_epoch"] == 0
    return report


@pytest.mark.timeout(900)
def test_on_one_rank_it_equals_the_unbroken_run_bit_for_bit(tmp_path):
    report = run_chaos(tmp_path, "--kills 5 --checkpoint-kills 2 --ranks 1")
    assert report["kills"] == 5
    assert report["largest_difference_of_weights"] == report["largest_difference_of_losses"] == 0


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("damage", ["before", "midway"])
def test_a_run_that_is_killed_twenty_times_loses_nothing(tmp_path, damage):
    report = run_chaos(tmp_path, f"--kills 20 --checkpoint-kills 8 --damage {damage}")
    assert report["kills"] == 20
    assert report["kills_while_a_checkpoint_was_written"] >= 5
    assert report["rank_changes"] >= 4
    assert report["mean_steps_between_kills"] >= 10
