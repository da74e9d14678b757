"""Programs mean the same bytes under every locale, and end quietly when their reader leaves."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import unicl_fast
from unicl_fast.system import program

_LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(code: str, *words: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    begin = "from unicl_fast.system.program import begin_program\nwords = begin_program()\n"
    return subprocess.run(
        [sys.executable, "-c", begin + code, *words],
        env=os.environ | environment,
        capture_output=True,
        check=False,
        timeout=60,
    )


def test_arguments_and_names_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "h\u00fchner").touch()
    name = os.fsencode("h\u00fchner") + b"\xff"
    code = "import os; print(ascii([*words, *os.listdir(words[1])]))"
    found = run(code, name, str(tmp_path), **_LATIN)
    expected = [os.fsdecode(name), str(tmp_path), "h\u00fchner"]
    assert found.stdout.decode().strip() == ascii(expected), found.stderr
    assert found.stdout == run(code, name, str(tmp_path), LC_ALL="C.UTF-8").stdout


def test_a_library_call_under_another_locale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(ValueError, match="names for ascii .* start Python with PYTHONUTF8=1"):
        program.require_utf8_names()


def test_every_program_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["unicl-eval", "--version"])
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        program.begin_program()
    assert not ended.value.code
    assert out.getvalue() == f"unicl_fast {unicl_fast.__version__}\n"


def test_what_libraries_tell_their_callers_is_shown_only_where_it_is_asked_for() -> None:
    warn = "import warnings; warnings.warn('old', FutureWarning); warnings.warn('odd')"
    assert b"odd" in run(warn).stderr
    assert b"old" not in run(warn).stderr
    assert b"old" in run(warn, PYTHONWARNINGS="default").stderr


@pytest.mark.parametrize("ending", ["", "; sys.stdout.flush()", "; raise SystemExit(3)"])
def test_a_reader_that_leaves_ends_no_program(tmp_path: Path, ending: str) -> None:
    """As in `unicl-pack inspect ... 2>&1 | head -1`, also where only the last flush finds out."""
    done = tmp_path / "done"
    lines = "for n in range(9999): print(n, flush=n % 99 == 98); print(n, file=sys.stderr)"
    code = f"""
from unicl_fast.system.program import begin_program
import sys, pathlib
begin_program()
sys.stdin.read()
{lines if "flush" in ending else "print(1)"}
pathlib.Path(sys.argv[1]).touch(){ending}
"""
    errors = tmp_path / "errors"
    with (
        errors.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-c", code, str(done)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if "flush" in ending else file,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=60) == (3 if "3" in ending else 0)
    assert done.exists()
    assert not errors.read_bytes()
