"""Work that cannot be counted is named once if it takes long."""

import itertools

import pytest
from waiting import wait_until

from unicl_fast.system import line
from unicl_fast.system.phases import Phase, current_phase, mark, mark_progress


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of work that takes any time at all."""
    lines: list[str] = []
    monkeypatch.setattr("unicl_fast.system.bar.write_line", lines.append)
    monkeypatch.setattr(line, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(line, "_SOON", 0.0)
    return lines


def test_only_work_that_takes_long_is_named(seen, monkeypatch):
    with line.line("drawing the curves"):
        wait_until(lambda: seen)
    monkeypatch.setattr(line, "_SOON", 3600.0)
    with line.line("reading weights"):
        pass
    assert seen == ["drawing the curves ..."]


def test_each_phase_is_named_once(seen):
    mark("starting")
    with line.line(current_phase):
        for step, name in enumerate(["starting", "step: encoding", "", "reading weights"]):
            mark(name, step)
            mark_progress()
            wait_until(lambda name=name: f"{name} ..." in seen or not name)
            mark("step: encoding", step)
    assert sorted(seen) == ["reading weights ...", "starting ...", "step: encoding ..."]


def test_quick_steps_are_no_long_work(seen, monkeypatch):
    monkeypatch.setattr(line, "_SOON", 1e-9)
    steps = itertools.count()
    with line.line(lambda: Phase("step: encoding", next(steps))):
        wait_until(lambda: next(steps) > 100)
    assert not seen


@pytest.mark.parametrize(("shown", "rank"), [(False, "0"), (True, "1")])
def test_quiet_programs_and_other_ranks_show_no_line(shown, rank, seen, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    looks = itertools.count()
    with line.line(lambda: Phase(f"look {next(looks)}"), shown=shown):
        pass
    assert next(looks) == 0
    assert not seen
