"""Files are replaced completely or not at all; locks and temporary folders end with a process."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from unicl_fast.system import atomic_files
from unicl_fast.system.atomic_files import (
    is_at,
    lock,
    locked,
    make_folder,
    replacing,
    sole_writer,
    temporary_folder,
    write_text_atomically,
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "file is not a folder; name another one"),
        ("file/a/b", "b cannot be made: .*file is a file; name another one"),
        ("link", "link is not a folder; name another one"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=message):
        make_folder(tmp_path / name)
    with pytest.raises(ValueError, match=message), sole_writer(tmp_path / name):  # unicl-pretrain
        pass
    make_folder(tmp_path / "c" / "d")
    make_folder(tmp_path / "c" / "d")
    assert (tmp_path / "c" / "d").is_dir()


HOLDING = """
import sys, time
from unicl_fast.system.atomic_files import temporary_folder
with temporary_folder("unicl-test-") as folder:
    (folder / "content").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_folder_that_another_start_removes_before_it_is_locked_is_made_again(
    tmp_path, monkeypatch
):
    calls = []

    def lock_after_another_start(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            with temporary_folder("unicl-test-", root=tmp_path):
                pass
        return lock(descriptor)

    monkeypatch.setattr(atomic_files, "lock", lock_after_another_start)
    with temporary_folder("unicl-test-", root=tmp_path) as folder:
        assert folder.is_dir()
    assert len(calls) == 4  # ours, the other's of our folder and of its own, ours again


def test_who_waits_for_a_lock_of_another_process_is_seen_to_wait(tmp_path, monkeypatch):
    other, marks = contextlib.ExitStack(), []

    def mark() -> None:
        marks.append(1)
        if len(marks) == 2:
            other.close()

    monkeypatch.setattr(atomic_files, "mark_progress", mark)
    monkeypatch.setattr(atomic_files, "_POLLED_SECONDS", 0)
    other.enter_context(locked(tmp_path / "lock"))
    with locked(tmp_path / "lock", wait=True) as is_ours:
        assert is_ours
        assert len(marks) == 2


def test_folders_of_killed_programs_are_removed_and_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDING],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    try:
        killed, living = (Path(process.stdout.readline().strip()) for process in processes)
        processes[0].kill()
        processes[0].wait()
        foreign = tmp_path / "unicl-test-of-somebody-else"
        foreign.mkdir()
        assert killed.is_dir()
        with temporary_folder("unicl-test-") as folder:
            assert folder.is_dir()
            assert not killed.exists()
            assert (living / "content").read_text() == "x"
            assert foreign.is_dir()
        assert not folder.exists()
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as aside:
        aside.write_text("new" + 10_000 * " " + "\ud800", encoding="utf-8")
    assert path.read_text() == "old"
    write_text_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_ends_with_its_descriptor(tmp_path):
    path = tmp_path / "lock"
    one, other = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock(one)
    assert not lock(other)
    assert is_at(one, path)
    os.close(one)
    assert lock(other, wait=True)
    path.unlink()
    assert not is_at(other, path)
    os.close(other)


def test_a_lock_s_file_that_its_holder_removes_is_waited_for_again(tmp_path, monkeypatch):
    """By then a third process can have made and locked a new one."""
    waits, came = threading.Event(), list[str]()
    monkeypatch.setattr(atomic_files, "mark_progress", waits.set)

    def wait() -> None:
        with locked(tmp_path / "lock", wait=True):
            came.append("second")

    second = threading.Thread(target=wait)
    with contextlib.ExitStack() as third:
        with locked(tmp_path / "lock"):
            second.start()
            waits.wait(60)
            (tmp_path / "lock").unlink()
            third.enter_context(locked(tmp_path / "lock"))
        waits.clear()
        while second.is_alive() and not waits.wait(0.01):
            pass
        came.append("third")
    second.join()
    assert came == ["third", "second"]
