"""How every program begins, before it reads its arguments."""

import contextlib
import faulthandler
import gc
import inspect
import io
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import docstring_parser

from unicl_fast.system.version import __version__

_UTF8_MODE = "PYTHONUTF8"
EXIT_ABORTED = 130
"""The shells' exit code for Ctrl-C; `unicl-pretrain` ends with it after the second one."""


def begin_program() -> list[str]:
    """Prepares the process of a program; returns its arguments, or answers --version."""
    # Class names come from file names, which Python can decode differently under LC_ALL=C or a
    # locale of ISO-8859-1. It cannot change this once it has started.
    if not has_utf8_names() and os.environ.get(_UTF8_MODE) != "1":
        os.environ[_UTF8_MODE] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if not faulthandler.is_enabled():
        # a crash of native code says where Python was; not without a stream, or with a notebook's
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
            faulthandler.enable()
    sys.stdout, sys.stderr = map(_without_broken_pipe, (sys.stdout, sys.stderr))
    sys.excepthook = _end_on_ctrl_c
    if sys.argv[1:] == ["--version"]:
        print(f"unicl_fast {__version__}")
        sys.exit()
    if not sys.warnoptions:  # FutureWarnings are for callers of libraries; -W shows them
        warnings.simplefilter("ignore", FutureWarning)
    docstring_parser.parse_from_object = _parse_without_indents  # type: ignore[assignment]
    return sys.argv[1:]


def _parse_without_indents(obj: Any, *, parse: Any = docstring_parser.parse_from_object) -> Any:
    """Removes the fields' indentation, from which tyro's help would make paragraphs."""
    found = parse(obj)
    for field in found.params:
        field.description = field.description and inspect.cleandoc(field.description)
    return found


@contextlib.contextmanager
def logging_at(name: str, level: int) -> Iterator[None]:
    """Drops a logger's messages below a level within this context."""
    chosen = logging.getLogger(name)
    before = chosen.level
    chosen.setLevel(level)
    try:
        yield
    finally:
        chosen.setLevel(before)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For imports of torch and timm: a seventh of their CPU time looks for garbage, in vain.

    Where wandb is installed, timm would import it, half a CPU second, for summaries of its own.
    """
    gc.disable()
    if is_new := "wandb" not in sys.modules:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if is_new:
            del sys.modules["wandb"]
        gc.enable()


def has_utf8_names() -> bool:
    """Returns whether Python reads file names as UTF-8, as it does except under odd locales."""
    return sys.getfilesystemencoding() == "utf-8"


def require_utf8_names() -> None:
    """Raises ValueError if file names would be read differently than elsewhere."""
    if not has_utf8_names():
        raise ValueError(
            f"Python reads file names as {sys.getfilesystemencoding()} under this locale, and a "
            f"data set would get other names than elsewhere: start Python with {_UTF8_MODE}=1"
        )


def _end_on_ctrl_c(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Ends a program with a sentence after Ctrl-C; shows other errors as usual."""
    if not issubclass(kind, KeyboardInterrupt) or os.environ.get("UNICL_TRACEBACK"):
        sys.__excepthook__(kind, error, trace)
        return
    from unicl_fast.system.machine import LAUNCHED_BY_US

    if os.environ.get("RANK", "0") == "0" and LAUNCHED_BY_US not in os.environ:
        name = Path(sys.argv[0]).name
        program = name if name.startswith("unicl-") else "unicl_fast"
        print(f"\n{program}: stopped by Ctrl-C", file=sys.stderr)
    sys.exit(EXIT_ABORTED)


class _Output(io.FileIO):
    """Standard output or error; output is discarded once its reader has left."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            # the work continues; output of C++ libraries and Python's last flush go there too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data) or 0


def _without_broken_pipe(stream: TextIO) -> TextIO:
    try:
        raw = _Output(stream.fileno(), "wb", closefd=False)
    except (AttributeError, OSError, ValueError):  # no stream at all, or a notebook's
        return stream
    unbuffered = getattr(stream, "write_through", False)  # PYTHONUNBUFFERED, as containers set it
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=unbuffered,
    )
