"""Runs first_run.ipynb in an empty folder and keeps its outputs: `make notebook`.

The cells are written in the notebook itself. The outputs are kept as a page for readers: of a
progress bar only the last state, no path of the machine, and no more bytes than a repository should
carry.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import nbformat

NOTEBOOK = Path(__file__).with_name("first_run.ipynb")
MAX_BYTES = 1_500_000
FOLDERS = (
    *("/tmp/", "/home/", "/root/", "/usr/", "site-packages"),
    *(f"{path}/" for path in (Path.home(), NOTEBOOK.resolve().parents[1], sys.prefix)),
    f"{tempfile.gettempdir()}/",
)
"""Folders that no page shows: usual ones, and those of this machine."""
_OVERWRITTEN = re.compile(r"[^\n]*\r(?!\n)|\x1b\[[\d;]*[mK]|^ +$\n?", re.MULTILINE)


def run_notebook(folder: Path) -> nbformat.NotebookNode:
    """Runs the notebook in that folder and returns it with outputs; raises CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shutil.copy(NOTEBOOK.with_suffix(".csv"), folder)
    programs = str(Path(sys.executable).parent)
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # of tqdm without ipywidgets
    NotebookClient(
        notebook, timeout=900, record_timing=False, resources={"metadata": {"path": str(folder)}}
    ).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # not this machine's version
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = _as_shown(cell.outputs)
    return notebook


def _as_shown(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins text that was printed in pieces, as a terminal would show it at the end."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            text = _OVERWRITTEN.sub("", output.text.replace("\r\n", "\n"))
            output.text = re.sub(r"\n\s*\n+", "\n\n", text)
    return joined


def check_page(text: str) -> None:
    """Raises ValueError for a page that is too large or names folders of a machine."""
    size = len(text.encode())
    if size > MAX_BYTES:
        raise ValueError(f"the notebook would have {size:,} bytes; at most {MAX_BYTES:,} are kept")
    for path in FOLDERS:
        if (place := text.find(path)) >= 0:
            around = text[max(0, place - 200) : place + 200]
            raise ValueError(f"the notebook shows {path}, a folder of this machine: {around}")


def main() -> None:
    """Entry point of `make notebook`."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        text = nbformat.writes(run_notebook(Path(folder)))
    check_page(text)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
