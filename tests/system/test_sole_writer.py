"""One process at a time writes into a folder, and the next one is told which."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from unicl_fast.system import atomic_files
from unicl_fast.system.atomic_files import sole_writer

HOLD = """
import sys
from pathlib import Path
from unicl_fast.system.atomic_files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.timeout(120)
def test_the_second_is_refused_by_name_until_the_first_has_ended_however(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    named = f"{folder} is being written by process {holder.pid} on {socket.gethostname()}, since 20"
    with pytest.raises(ValueError, match=named), sole_writer(folder):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with sole_writer(folder) as check:
        check()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_where_nobody_can_write_is_refused(tmp_path, monkeypatch, code):
    refuse = mock.Mock(side_effect=OSError(code, os.strerror(code)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)  # root, as tests can be, can write anywhere
    refusal = f"{tmp_path}/run cannot be written to .{os.strerror(code)}.: choose a folder"
    with pytest.raises(ValueError, match=refusal), sole_writer(Path("run")):
        pass


def test_nothing_is_left_of_it(tmp_path):
    with sole_writer(tmp_path / "empty"):
        assert len(list((tmp_path / "empty").iterdir())) == 1
    assert not (tmp_path / "empty").exists()
    with pytest.raises(KeyError), sole_writer(tmp_path / "failed"):
        raise KeyError
    assert not (tmp_path / "failed").exists()
    with sole_writer(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]


def test_without_locks_the_first_notices_that_a_second_has_come(tmp_path, monkeypatch, caplog):
    """As on network drives that are mounted without a lock service."""
    refuse = mock.Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
    monkeypatch.setattr(atomic_files.fcntl, "flock", refuse)
    with sole_writer(tmp_path) as first:
        first()
        assert "no locks there (No locks available)" in caplog.text
        with sole_writer(tmp_path) as second:
            second()
            with pytest.raises(RuntimeError, match=f"{tmp_path} was taken over by process"):
                first()


def test_a_folder_that_somebody_removes_is_none_of_its_faults(tmp_path):
    with sole_writer(tmp_path / "run") as check:
        next((tmp_path / "run").iterdir()).unlink()
        (tmp_path / "run").rmdir()
        check()
