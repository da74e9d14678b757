"""Programs mean the same bytes under every locale, and end quietly when their reader leaves."""

import dataclasses
import importlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import tyro

import unicl_fast
from unicl_fast.system import program
from unicl_fast.system.checked_fields import plain_number
from unicl_fast.tools import start
from unicl_fast.tools.numbers import plain_numbers

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
_LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(code: str, *words: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    begin = "from unicl_fast.system.program import begin_program\nwords = begin_program()\n"
    return subprocess.run(
        [sys.executable, "-c", begin + code, *words],
        env=os.environ | environment,
        capture_output=True,
        timeout=120,
    )


def test_arguments_and_names_are_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "h\u00fchner").touch()
    name = os.fsencode("h\u00fchner") + b"\xff"
    code = "import os; print(ascii([*words, *os.listdir(words[1])]))"
    found = run(code, name, str(tmp_path), **_LATIN)
    expected = [os.fsdecode(name), str(tmp_path), "h\u00fchner"]
    assert found.stdout.decode().strip() == ascii(expected), found.stderr
    assert found.stdout == run(code, name, str(tmp_path), LC_ALL="C.UTF-8").stdout


def test_a_library_call_under_another_locale_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(ValueError, match="names as ascii .* start Python with PYTHONUTF8=1"):
        program.require_utf8_names()


def test_every_program_knows_its_version(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["unicl-eval", "--version"])
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        program.begin_program()
    assert not ended.value.code
    assert out.getvalue() == f"unicl_fast {unicl_fast.__version__}\n"


def test_what_libraries_tell_their_callers_is_shown_only_where_it_is_asked_for():
    warn = "import warnings; warnings.warn('old', FutureWarning); warnings.warn('odd')"
    assert b"odd" in run(warn).stderr
    assert b"old" not in run(warn).stderr
    assert b"old" in run(warn, PYTHONWARNINGS="default").stderr


def test_a_crash_of_native_code_says_where_python_was():
    crash = "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.abort()"
    crashed = run(f"def decode():\n    {crash}\ndecode()", PYTHONFAULTHANDLER="", PYTHONDEVMODE="")
    assert crashed.returncode == -signal.SIGABRT
    assert re.search(rb"Fatal Python error: Aborted.*line 4 in decode", crashed.stderr, re.DOTALL)


def test_a_program_begins_without_a_file_as_its_standard_error():
    code = "import io, sys; from unicl_fast.system.program import begin_program as begin; "
    code += "sys.stderr = io.StringIO(); begin(); print('begun')"
    begun = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert begun.stdout == b"begun\n", begun.stderr


@pytest.mark.parametrize("script", sorted(set(SCRIPTS.values())))
def test_every_program_begins_as_all_do(script, monkeypatch):
    """So that the tests of one program hold for all."""
    module, _, name = script.partition(":")
    assert module == start.__name__
    begun: list[str] = []
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name: begun.append(name) or types.SimpleNamespace(main=int),
    )
    getattr(start, name)()
    spec = importlib.util.find_spec(begun[0])
    assert spec is not None
    assert "begin_program() if " in Path(str(spec.origin)).read_text(encoding="utf-8")


@pytest.mark.parametrize("traceback", ["", "1"])
def test_ctrl_c_ends_a_program_by_a_sentence_and_130(traceback):
    code = "begin_program(); print('ready', flush=True); import time; time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", f"from unicl_fast.system.program import begin_program; {code}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"UNICL_TRACEBACK": traceback},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    if traceback:
        assert "KeyboardInterrupt" in said
    else:
        assert (process.returncode, said) == (130, "\nunicl_fast: stopped by Ctrl-C\n")


@pytest.mark.parametrize("wrapped", [False, True])
def test_ctrl_c_while_a_program_is_imported_is_no_traceback(wrapped, tmp_path):
    """Also if a library makes another error of it, as some do that try to import an extension."""
    ask = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    if wrapped:
        ask = f"try:\n {ask}\nexcept BaseException:\n raise ImportError('broken install')"
    (tmp_path / "tyro.py").write_text(f"{ask}\nimport time; time.sleep(60)")
    code = "import sys; sys.argv[0] = '/bin/unicl-pack'; from unicl_fast.tools.start import pack"
    found = subprocess.run(
        [sys.executable, "-c", f"{code}; pack()"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (found.returncode, found.stderr) == (130, "\nunicl-pack: stopped by Ctrl-C\n")


@dataclasses.dataclass
class Options:
    steps: int = 1
    rate: float = 1
    sizes: tuple[int, ...] = ()
    perhaps: float | None = None


@pytest.mark.parametrize("text", ["\u0663", "1_0", "\uff11", "\u00bd", ""])
def test_options_are_numbers_of_ascii_digits(text):
    """`int` and `float` also read other scripts' digits, and underlines between them."""
    registry = plain_numbers()
    for options in (
        ["--steps", text],
        ["--rate", text],
        ["--sizes", "1", text],
        ["--perhaps", text],
    ):
        with pytest.raises(SystemExit):
            tyro.cli(Options, args=options, registry=registry)
    options = ["--steps", "-12", "--rate", "1e-3", "--sizes", "1", "2", "--perhaps", "None"]
    assert tyro.cli(Options, args=options, registry=registry) == Options(-12, 0.001, (1, 2), None)
    for kind in (int, float):
        with pytest.raises(ValueError, match="no number|invalid literal|could not convert"):
            plain_number(text, kind)


@pytest.mark.parametrize("ending", ["", "; sys.stdout.flush()", "; raise SystemExit(3)"])
def test_a_reader_that_leaves_ends_no_program(tmp_path, ending):
    """As in `unicl-pack inspect ... 2>&1 | head -1`, also if only the last flush finds out."""
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
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=120) == (3 if "3" in ending else 0)
    assert done.exists()
    assert not errors.read_bytes()


def test_help_breaks_lines_where_the_terminal_ends(tmp_path):
    """Not at the line breaks of a docstring."""
    path = tmp_path / "options.py"
    path.write_text(
        "import dataclasses, tyro\n"
        "from unicl_fast.system.program import begin_program\n"
        "@dataclasses.dataclass\n"
        "class Options:\n"
        "    width: int = 3\n"
        '    """Of the first line,\n    and of the second."""\n'
        "tyro.cli(Options, args=begin_program())\n"
    )
    shown = subprocess.run(
        [sys.executable, path, "--help"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert "Of the first line, and of the second." in shown


def test_unbuffered_output_is_not_kept_back():
    code = "import os\nprint('one', end='')\nos.write(1, b'two')"
    assert run(code, PYTHONUNBUFFERED="1").stdout == b"onetwo"


def test_wandb_is_hidden_from_timm_and_found_again(monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with program.quick_imports(), pytest.raises(ImportError):
        importlib.import_module("wandb")
    assert importlib.import_module("wandb").__file__ == str(tmp_path / "wandb.py")
    with program.quick_imports():  # it stays where somebody has imported it
        assert importlib.import_module("wandb")
    monkeypatch.delitem(sys.modules, "wandb")
