"""`unicl-doctor`: its rows whatever a check does, what it prints, and its checks of folders."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from program_runs import call, run

from unicl_fast.tools.doctor import __main__ as doctor
from unicl_fast.tools.doctor import storage
from unicl_fast.tools.doctor.rows import Check, Found, Row, run_check, run_checks

_DOCS = Path(__file__).parents[2] / "docs"
_SOUND = Found("ok", "sound")
Patch = pytest.MonkeyPatch


def assert_found(found: Found, state: str, text: str) -> None:
    """A row has a state, and says a text in what was found or what to do."""
    assert found.state == state
    assert text in f"{found.found} {found.fix}"


# The rows, whatever a check does.


def test_a_check_that_raises_is_a_fault_with_its_error() -> None:
    def breaks() -> Found:
        raise KeyError("no such field")

    row = run_check(Check("memory", breaks))
    assert row[:2] == ("memory", "fault")
    assert "the check failed: KeyError('no such field')" in row.found


def test_checks_that_end_or_block_the_process_are_rows_and_the_others_run() -> None:
    def ends() -> Found:
        os.kill(os.getpid(), signal.SIGTERM)
        return _SOUND

    def leaves() -> Found:
        os._exit(3)

    def blocks() -> Found:
        time.sleep(60)
        return _SOUND

    looks = {"first": lambda: _SOUND, "a": ends, "b": leaves, "c": blocks, "last": lambda: _SOUND}
    checks = [Check(name, look) for name, look in looks.items()]
    rows = run_checks(checks, most_seconds=0.5)
    assert [row.name for row in rows] == list(looks)
    assert [row.state for row in rows] == ["ok", "fault", "fault", "fault", "ok"]
    assert "by SIGTERM" in rows[1].found
    assert "with code 3" in rows[2].found
    assert "took more than" in rows[3].found


def test_what_cannot_be_looked_at_names_the_fault_that_is_to_be_mended_first() -> None:
    checks = [
        Check("torch", lambda: Found("fault", "cannot be imported", "install it")),
        Check("bf16", lambda: Found("fault", "never asked"), needs=("torch",)),
    ]
    assert run_checks(checks)[1].state == "warning"
    assert "because torch has a fault" in run_checks(checks)[1].found


# The program.


ROWS = [
    Row("disk", "ok", "/a/" + "very-long-name" * 20),
    Row("shared memory", "warning", "word " * 60, "docker run --shm-size=8g"),
    Row("torch", "fault", "\x1b[2J https://user:secret@host/x?token=1", "install it"),
]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_rows_fit_80_columns_and_say_their_state_by_word(monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    doctor.print_rows(ROWS, out)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split()[0] for line in text.splitlines() if line[:1].strip()] == [
        "ok", "WARNING", "FAULT", "1",
    ]  # fmt: skip
    assert "-> docker run --shm-size=8g" in text
    assert "1 fault, 1 warning" in text
    assert "\x1b" not in text
    assert "secret" not in text


def test_colours_are_for_terminals_whose_user_wants_them(monkeypatch: Patch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    doctor.print_rows(ROWS, out)
    assert "\x1b[31mFAULT   \x1b[0mtorch" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    doctor.print_rows(ROWS, out)
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warning", 0), ("fault", 1)])
def test_the_exit_code_is_1_with_a_fault_and_json_has_every_row(
    monkeypatch: Patch, tmp_path: Path, capsys: pytest.CaptureFixture[str], state: Any, code: int
) -> None:
    check = Check("data set", lambda: Found(state, "https://user:secret@host/x", "do it"))
    monkeypatch.setattr(doctor, "all_checks", lambda data: [check])
    file = tmp_path / "rows.json"
    with pytest.raises(SystemExit) as ended:
        call(doctor, "--json", file)
    assert ended.value.code == code
    assert "data set" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call(doctor, "--json", "-")
    printed = capsys.readouterr().out
    assert (
        json.loads(printed)
        == json.loads(file.read_text())
        == {
            "num_faults": int(state == "fault"),
            "num_warnings": int(state == "warning"),
            "rows": [
                {"name": "data set", "state": state, "found": "https://host/x", "fix": "do it"}
            ],
        }
    )


def test_a_json_file_that_cannot_be_written_is_a_sentence(
    monkeypatch: Patch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "all_checks", lambda data: [Check("one", lambda: _SOUND)])
    with pytest.raises(SystemExit) as ended:
        call(doctor, "--json", tmp_path / "none" / "rows.json")
    assert ended.value.code == 2
    assert "No such file" in capsys.readouterr().err


def test_every_row_is_explained_in_the_documentation(tmp_path: Path) -> None:
    page = (_DOCS / "reliability.md").read_text()
    names = [check.name for check in doctor.all_checks(tmp_path)]
    assert not [name for name in names if f"`{name}`" not in page]


@pytest.mark.slow
def test_the_program_runs_here_and_without_a_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This machine trains, so nothing here is a fault; what is slow depends on its load."""
    monkeypatch.setenv("HOME", "/proc/nowhere")
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_bytes(b"x" * 5000)
    done = run("doctor", "--data", tmp_path, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [one.name for one in doctor.all_checks(tmp_path)]
    assert done.stdout.count("\nok ") > 10
    states = {row["name"]: row["state"] for row in rows}
    assert states["Numba kernels"] == states["cache folder"] == "warning"


# Folders and disks.


def mounted(monkeypatch: Patch, tmp_path: Path, kind: str, options: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/x / ext4 rw 0 0\nserver:/a {tmp_path} {kind} {options} 0 0\n")
    monkeypatch.setattr(storage, "_MOUNTS", mounts)


@pytest.fixture
def roomy(monkeypatch: Patch) -> SimpleNamespace:
    """Says how much room every disk has."""
    usage = SimpleNamespace(total=10**12, free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return usage


def test_folders_that_are_full_read_only_or_without_locks(
    monkeypatch: Patch, tmp_path: Path, roomy: SimpleNamespace
) -> None:
    mounted(monkeypatch, tmp_path, "nfs4", "rw,noexec,local_lock=none")
    below = tmp_path / "not" / "there"
    assert storage.check_folder(below).state == "ok"
    assert_found(storage.check_folder(below), "ok", "(nfs4)")
    assert_found(storage.check_folder(below, runs_code=True), "warning", "noexec")
    for option in ("nolock", "local_lock=all", "localflock"):
        mounted(monkeypatch, tmp_path, "nfs", f"rw,{option}")
        assert_found(storage.check_folder(below), "warning", "two hosts can write")
    roomy.free = 10**9
    assert_found(storage.check_folder(below), "warning", "make room, or take another")
    roomy.total = 0
    assert_found(storage.check_folder(below), "warning", "cannot be written")
    roomy.total = 10**12
    roomy.free = 0
    assert storage.check_folder(below).state == "fault"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_found(storage.check_folder(below), "warning", "cannot be written")


def test_folders_that_a_user_may_lack(
    monkeypatch: Patch, tmp_path: Path, roomy: SimpleNamespace
) -> None:
    def fails() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mounted(monkeypatch, tmp_path, "ext4", "rw")
    for check in (storage.check_temporary_folder, storage.check_cache_folder):
        assert check().state == "ok"
    monkeypatch.setattr(storage.tempfile, "gettempdir", fails)
    assert storage.check_temporary_folder().state == "fault"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert_found(storage.check_cache_folder(), "warning", "no home")


def test_a_current_folder_that_was_removed_is_a_fault(
    monkeypatch: Patch, tmp_path: Path, roomy: SimpleNamespace
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.check_working_folder().state == "ok"
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    found = storage.check_working_folder()
    assert (found.state, found.fix) == ("fault", "cd ~")
    assert os.getcwd() == "/"


def test_the_rate_of_a_data_set(monkeypatch: Patch, tmp_path: Path, roomy: SimpleNamespace) -> None:
    folder = tmp_path / "data"
    assert storage.check_data(folder).state == "fault"
    folder.mkdir()
    (folder / "empty").touch()
    assert_found(storage.check_data(folder), "fault", "no file with anything")
    for number in range(3):
        (folder / f"{number}.shard").write_bytes(bytes(3_000_000 + number))
    assert [file.name for file in storage.sample_files(folder)] == ["2.shard", "1.shard", "0.shard"]
    num_bytes, seconds = storage.measure_reading(storage.sample_files(folder))
    assert num_bytes == 9_000_003
    assert seconds > 0
    assert storage.measure_reading(storage.sample_files(folder), most_seconds=0)[0] < 2**20 + 1
    monkeypatch.setattr(storage, "measure_reading", lambda files: (10**9, 1.0))
    assert_found(storage.check_data(folder), "ok", "1,000 MB/s")
    assert storage.check_data(folder / "0.shard").state == "ok"
    roomy.free = 10
    assert_found(storage.check_data(folder), "warning", "make room")
    monkeypatch.setattr(storage, "measure_reading", lambda files: (10**7, 1.0))
    assert_found(storage.check_data(folder), "warning", "10 MB/s")
