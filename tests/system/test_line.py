"""The line about work that cannot be counted, on a terminal and in a log."""

import contextlib
import os
import re
import subprocess
import sys
import termios
import threading

import pytest

from unicl_fast.system import line


def seen_on_a_terminal(code: str, **environment: str) -> str:
    """The output of a program that has begun to a terminal of 80 columns.

    The program prints patterns to stdout; each is answered by a line of input once the terminal
    shows it. `shows` in the code does both.
    """
    terminal, end = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", _BEGIN + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=end,
        env={"TERM": "xterm", **os.environ, **environment},
        text=True,
    )
    os.close(end)
    seen = b""

    def read() -> None:
        nonlocal seen
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(terminal, 65536):
                seen += data
                came.set()

    came = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    assert process.stdin
    assert process.stdout
    for asked in process.stdout:
        while not re.search(asked.strip(), seen.decode()):
            assert came.wait(120), f"{asked} does not come; so far: {seen!r}"
            came.clear()
        print(file=process.stdin, flush=True)
    assert process.wait(120) == 0, seen
    reader.join()
    os.close(terminal)
    return seen.decode()


_BEGIN = """
import sys
from unicl_fast.system import line
from unicl_fast.system.phases import describe_phase, mark
from unicl_fast.system.program import begin_program
begin_program()
line._SOON = line._LOOK_SECONDS = 0.05
def shows(pattern):
    print(pattern, flush=True)
    sys.stdin.readline()
def say(text, end="\\n"):
    print(text, end=end, file=sys.stderr, flush=True)
"""
_QUIET = r"""
with line.line(describe_phase):
    shows(r"\[starting, \d s\]")
    say("ready")
    say("x" * 70, end="\r")
    say("\rbar 50%", end="")
    mark("drawing the curves", 7)
    shows(r"bar 50% \[drawing the curves, 7 steps done, \d s\]")
    say("\rbar 100%")
    with line.line("reading weights"):
        shows(r"\[reading weights, \d s\]")
    mark("")
    say("done")
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_terminal_shows_what_takes_long_and_keeps_what_was_printed(unbuffered):
    seen = seen_on_a_terminal(_QUIET, PYTHONUNBUFFERED=unbuffered)
    assert re.match(r"(\r\[starting, \d s\]\x1b\[K)+\r\x1b\[Kready\r\n", seen)
    phase = r"\[drawing the curves, 7 steps done, \d s\]"
    assert re.search(rf"\rbar 50% {phase}\x1b\[K\rbar 50%\x1b\[K\rbar 1", seen)
    assert re.search(r"\rbar 100%\r\n(\r\[reading weights, \d s\]\x1b\[K)+\r", seen)
    assert seen.endswith("done\r\n")


@pytest.mark.parametrize(("shown", "rank"), [("False", "0"), ("True", "1")])
def test_quiet_programs_and_other_ranks_show_no_line(shown, rank):
    code = f"""
with line.line("reading weights", shown={shown}):
    assert line.on_terminal is None
    say("done")
"""
    assert seen_on_a_terminal(code, RANK=rank) == "done\r\n"


def test_a_log_gets_a_line_once_if_the_work_takes_long(monkeypatch, capsys):
    timers: list[threading.Timer] = []

    class Timer(threading.Timer):
        def start(self) -> None:
            timers.append(self)

    monkeypatch.setattr(line.threading, "Timer", Timer)
    with line.line("reading weights"):
        assert timers[0].interval == line._SOON
        assert capsys.readouterr().err == ""
        timers[0].function()
        assert capsys.readouterr().err == "reading weights ...\n"
    assert timers[0].finished.is_set()  # so quick work is never named
    with line.line("reading weights", shown=False), line.line(lambda quiet: "something"):
        assert len(timers) == 1
