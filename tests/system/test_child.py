"""Risky work in a child: limits of memory and time, and how a child that died is described."""

import os
import signal
import sys

import pytest

from unicl_fast.system.child import Child, Death, describe_death, fault_of, run_limited

GB = 10**9


def work(task: str) -> str:
    """Does as it is told."""
    print("noise", file=sys.stderr)
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "leave":
        os._exit(3)
    if task == "hang":
        signal.pause()
    if task == "fill":
        return str(len(bytearray(2 * GB)))
    if task == "refuse":
        raise ValueError("the task is refused")
    return f"{task} done"


def test_deaths_cost_their_task_only(capfd):
    tasks = ["one", "crash", "two", "leave", "fill", "three"]
    found = list(run_limited(work, tasks, memory_bytes=GB))
    assert found == [
        "one done",
        Death("crash", "crashed (SIGSEGV)"),
        "two done",
        Death("crash", "crashed (exit code 3)"),
        Death("memory", "needs more than 1.0 GB of memory"),
        "three done",
    ]
    assert capfd.readouterr() == ("", "")


def test_a_task_that_hangs_is_ended():
    found = run_limited(work, ["hang", "one"], seconds=0.5)
    assert next(found) == Death("time", "did not end within 0.5 s")
    found.close()


def test_errors_of_the_function_are_raised_or_described():
    with pytest.raises(ValueError, match="the task is refused"):
        list(run_limited(work, ["refuse"]))
    assert fault_of(work, "refuse", seconds=300) == "failed: ValueError: the task is refused"
    assert fault_of(work, "one", seconds=300) == ""


def test_a_child_that_is_killed_may_have_been_out_of_memory():
    assert describe_death(-signal.SIGKILL).how == "was killed, possibly out of memory"
    assert describe_death(-60).how == "crashed (signal 60)"


def test_a_child_that_is_killed_while_it_starts_is_started_again(monkeypatch):
    """The kernel's OOM killer does not wait for the first task. But not for ever."""
    codes = iter([-9, -9, 0, *[-9] * 3])
    monkeypatch.setattr(Child, "_start", lambda *_: next(codes))
    Child(print)
    with pytest.raises(RuntimeError, match=r"could not start \(exit code -9\)"):
        Child(print)
    assert not list(codes)
