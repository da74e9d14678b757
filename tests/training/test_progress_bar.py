"""The progress bar in a terminal: every line is whole, whatever is logged beside it."""

import contextlib
import errno
import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from small_runs import StepLoader, tiny_config

from unicl_fast.batch import Batch
from unicl_fast.system.bar import Bar
from unicl_fast.training.assembly import make_trainer


@pytest.fixture(autouse=True)
def _bars_are_shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # no thread is left behind
    monkeypatch.setattr("unicl_fast.system.bar._SOON", 0.0)


class Terminal:
    """The rows of text that a terminal shows, the last one being written to."""

    def __init__(self) -> None:
        self.raw = b""

    def rows(self) -> list[str]:
        rows, row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[\w|.|\n|\r", self.raw.decode(), flags=re.DOTALL):
            if token == "\r":
                column = 0
            elif token == "\n":
                row += 1
                rows += [""] * (row == len(rows))
            elif token == "\x1b[A":
                row -= 1
            else:
                assert len(token) == 1, f"an unknown code {token!r}"
                rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
                column += 1
        return [row.rstrip() for row in rows]


class FullDisk(io.StringIO):
    """A log file for which there is no room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        self.write("")


@contextlib.contextmanager
def terminal_on_stderr(monkeypatch: pytest.MonkeyPatch, *, columns: int) -> Iterator[Terminal]:
    """A pseudo-terminal in place of stderr, where the console's log goes too."""
    terminal, (ours, theirs) = Terminal(), pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def listen() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while read := os.read(ours, 4096):
                terminal.raw += read

    listener = threading.Thread(target=listen)
    listener.start()
    root = logging.getLogger()
    with open(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
        patch.setattr(root, "handlers", [*root.handlers, handler])
        yield terminal
        stream.flush()
    listener.join()
    os.close(ours)


def test_a_run_in_a_terminal_shows_whole_lines(images, tmp_path, monkeypatch):
    config = tiny_config(steps=6).changed(run={"evaluate_every_steps": 2})

    def with_a_line(batch: Batch) -> Batch:
        if batch.step == 1:
            logging.getLogger("loader").warning("reads step %d", batch.step)
        if batch.step == 3:
            warnings.warn("a library warns", stacklevel=1)
        return batch

    def evaluation(model: torch.nn.Module) -> dict[str, float]:
        for _ in Bar(range(3), desc="nested", leave=False):
            pass
        return {"top1": 0.5}

    with terminal_on_stderr(monkeypatch, columns=80) as terminal, warnings.catch_warnings():
        warnings.simplefilter("always")
        loader = StepLoader(images, change=with_a_line)
        evaluations = {"digits": evaluation}
        make_trainer(config, loader, run_folder=tmp_path, evaluations=evaluations).fit()
    rows = [row for row in terminal.rows() if row]
    drawn = [text for text in re.split(r"\r|\n|\x1b\[A", terminal.raw.decode()) if "%|" in text]
    assert len(drawn) > 6
    assert re.search(r"nested:[^\n]*\x1b\[A", terminal.raw.decode())  # below, and back up
    assert max(map(len, drawn)) <= 80
    # the end of the warning is the line of code that warns
    *logged, warned, code, bar = [row for row in rows if not row.startswith("step ")]
    assert logged == ["W loader: reads step 1"]
    assert re.fullmatch(r".*test_progress_bar\.py:\d+: UserWarning: a library warns", warned)
    assert code == '  warnings.warn("a library warns", stacklevel=1)'
    evaluated = [row for row in rows if row.startswith("step ")]
    assert evaluated == [f"step {step}, digits: top1 0.5" for step in (2, 4, 6)]
    more = r", [\d,]+ images/s, 0:00:00 left, data wait \d+%"
    assert re.fullmatch(r"train 100%\|\S+\| 6/6, loss \d\.\d{3}" + more, bar)


def test_stderr_on_a_full_disk_ends_no_run(images, tmp_path, monkeypatch):
    def with_a_line(batch: Batch) -> Batch:
        logging.getLogger("loader").warning("reads step %d", batch.step)
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", FullDisk())
        patch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler()])
        loader = StepLoader(images, change=with_a_line)
        evaluations = {"digits": lambda model: {"top1": 0.5}}
        config = tiny_config(steps=2)
        trainer = make_trainer(config, loader, run_folder=tmp_path, evaluations=evaluations)
        trainer.fit()
    assert trainer.step == 2
