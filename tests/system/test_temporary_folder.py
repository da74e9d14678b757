"""What a killed program leaves in /tmp is removed, and nothing that is in use."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from unicl_fast.system.atomic_files import temporary_folder

HOLDING = """
import sys, time
from unicl_fast.system.atomic_files import temporary_folder
with temporary_folder("unicl-test-") as folder:
    (folder / "content").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_folders_of_killed_programs_are_removed_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
