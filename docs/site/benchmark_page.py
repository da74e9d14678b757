"""Writes docs/benchmarks.md and docs/results/input.png from the results committed as JSON.

    python docs/site/benchmark_page.py                   # `make figures` also renews the results

A table for each stage of `unicl-bench`, and below it the command, machine, commit and month of each
of its results, so that no figure is copied by hand. `tests/test_docs.py` compares the page with
the results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unicl_fast.tools.bench import load_program

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # benchmarks/ is not installed

from benchmarks.input.report import table  # noqa: E402
from benchmarks.resume import report as resume_report  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks.md"

_INTRODUCTION = """# Benchmarks

All tables of this page are made from committed results, and `make figures` measures them again.
[Performance](performance.md) says what follows from them,
[benchmarks/README.md](../benchmarks/README.md) how they are measured, and
[Notes on performance](performance-notes.md) how the data sets of the commands are packed.

A cell is the median of the rounds, with the lowest and the highest. A ratio is taken within a
round, in which all contestants take turns. The machine is 2 cores of an AMD EPYC, unless another is
named."""


_RESUME = """## Loaders that are killed and resumed

`unicl-bench resume` kills all ranks of a loader 20 times at random moments and resumes it from the
state that its own pages document: on the same ranks and workers and on others, on one data set and
on a mix of three. Steps out of order differ from those of the unbroken run.

    pip install litdata grain webdataset datasets torchdata
    pip install --no-deps mosaicml-streaming brotli catalogue cramjam python-snappy zstd
    unicl-bench resume --json docs/results/resume.json

The versions (datasets 5.2.0, grain 0.2.18, LitData 0.2.76), each kill and each message are in
`docs/results/resume.json`. datasets 5.0.0 began anew at its second resume in a row (768 samples
doubled in 3 kills); 5.2.0 does not. Its shuffle() as it comes (datasets-shuffle) feeds all workers
again, but the state of several workers cannot be loaded."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A stage's results, and how its figures become rows and columns."""

    title: str
    command: str
    """A program of unicl-bench, and the options that choose these results."""
    files: str
    """Glob under the checkout."""
    figure: str = r"(?P<row>.+)"
    """Names of the figures that are shown, with the groups `row` and `column`, or one of them."""
    about: str = ""


_RESULTS = "benchmarks/results"
_USUAL_MACHINE = "AMD EPYC, 2 cores"
SECTIONS = (
    Section(
        "Loading images", "input", "docs/results/input-*.json",
        about="The ratios are our loader's images per CPU second to the row's; loaders of decoded "
        'images ("-raw") are compared with ours of decoded images. Limits do a part of the work.',
    ),
    Section(
        "Augmentation", "input --peers none --parts none", f"{_RESULTS}/augment_*.json",
        r"(?P<row>.*): (?P<column>rate by CPU time .*)",
    ),
    Section(
        "Packing compared with other writers", "pack", f"{_RESULTS}/pack_writers_*.json",
        r"keep: (?P<column>unicl-pack / [\w ]+)(, (?P<row>.*))?",
        "Ratios of images/s, of whole runs with the starts of their processes, and without.",
    ),
    Section("Tokenizer", "loss --parts tokens", f"{_RESULTS}/tokenize*.json"),
    Section(
        "Target map", "loss --parts targets", f"{_RESULTS}/targets*.json",
        r"(?P<column>[\d,]+ rows), (?P<row>map_targets, ms|times .*)",
        "The times of others are ratios to `map_targets`, which finds equal rows of 77 tokens.",
    ),
    Section(
        "Layouts of texts", "loss --parts text", f"{_RESULTS}/text*.json",
        r"(?P<row>.*), (?P<column>s|times the cost of its real tokens)",
    ),
    Section(
        "Loss", "loss --parts loss", f"{_RESULTS}/loss*.json",
        r"(?P<column>\d+): (?P<row>[^/]+) / ClipLoss fp32",
        "Time of value and gradients, in times that of open_clip's ClipLoss in fp32, by the "
        "number of images and texts.",
    ),
    Section(
        "Training step", "step", f"{_RESULTS}/step_*.json",
        r"(?P<column>.+, images/s|ratio)",
        "Images/s of a whole step, and the ratio of the two.",
    ),
    Section(
        "Switches of `efficiency`", "step --parts switches", f"{_RESULTS}/efficiency_*.json",
        r"(?P<row>.*), (?P<column>times as long|MB above the model)",
        "Each switch is set the other way than `unicl-pretrain` has it on that machine.",
    ),
    Section(
        "A step by its parts", "step --parts profile", f"{_RESULTS}/profile_*.json",
        r"(?P<row>.*?), (?P<column>s|times .*)",
        "The floor of a part is the time of its products at the rate of one large product.",
    ),
)  # fmt: skip


def page() -> str:
    """The whole page, which ends with a line break."""
    return "\n\n".join([_INTRODUCTION, *map(_section, SECTIONS), *_resumed()]) + "\n"


def _resumed() -> Iterator[str]:
    yield _RESUME
    if (path := ROOT / "docs" / "results" / "resume.json").is_file():
        yield resume_report.table(json.loads(path.read_text(encoding="utf-8")))


def _section(section: Section) -> str:
    paths = sorted(ROOT.glob(section.files))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    parts = [f"## {section.title}", section.about] if section.about else [f"## {section.title}"]
    if section.command == "input":
        for path, result in zip(paths, results, strict=True):
            parts += [_origin(section.command, path, result), table(result)]
    else:
        parts.append(_table(section, results))
        origins = zip(paths, results, strict=True)
        parts.append("\n".join(f"- {_origin(section.command, *origin)}" for origin in origins))
    return "\n\n".join(parts)


def _table(section: Section, results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each result or part of one; the settings in which results differ come first."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for label, result in zip(_labels(results), results, strict=True):
        for name, figure in result["figures"].items():
            if found := re.fullmatch(section.figure, name):
                groups = found.groupdict()
                cells = rows.setdefault((label, groups.get("row") or ""), {})
                cells[groups.get("column") or "median (lowest to highest)"] = _cell(figure)
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    shown = [part for part in (0, 1) if any(key[part] for key in rows)]
    lines = [[*("" for _ in shown), *columns], ["---"] * (len(shown) + len(columns))]
    lines += [
        [*(key[part] for part in shown), *(cells.get(column, "") for column in columns)]
        for key, cells in rows.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(figure: Mapping[str, float]) -> str:
    low, middle, high = (_number(figure[key]) for key in ("low", "median", "high"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _labels(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The settings in which results of one stage differ."""
    names = dict.fromkeys(name for result in results for name in result["settings"])
    values = {name: [result["settings"].get(name) for result in results] for name in names}
    differ = [
        name
        for name in names
        if name not in ("rounds", "formats", "memory", "parts")
        and values[name] != values[name][:1] * len(results)
    ]
    for result in results:
        label = []
        for name in differ:
            value, words = result["settings"].get(name), name.replace("_", " ")
            if isinstance(value, bool):
                label += [words] if value else []
            elif isinstance(value, int):
                label.append(f"{words} {value}")
            elif value:
                label.append(value.rsplit("/", 1)[-1])
        yield ", ".join(label)


def _origin(program: str, path: Path, result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    computer = f"{machine['processor']}, {machine['cores']} cores"
    facts = [
        *([computer] if computer != _USUAL_MACHINE else []),
        f"load {machine['load_average'][0]:.1f}",
        f"commit {machine['commit']}",
        machine["date"],
    ]
    link = f"[{path.stem}]({os.path.relpath(path, PAGE.parent)})"
    return f"{link}: `{command(program, result['settings'])}`; {'; '.join(facts)}"


def command(program: str, settings: Mapping[str, Any]) -> str:
    """The command that repeats a result: its settings that are not the program's defaults today."""
    words = ["unicl-bench", *program.split()]
    for field in dataclasses.fields(load_program(words[1])):
        value = settings.get(field.name)
        default = None if field.default is dataclasses.MISSING else field.default
        usual = list(default) if isinstance(default, tuple) else default
        if value == usual and field.name != "threads":  # whose default may be the machine's
            continue
        option = field.name.replace("_", "-")
        if f"--{option}" in words:  # given already
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{option}", *(shlex.quote(str(one)) for one in values)]
    return " ".join(words)


if __name__ == "__main__":
    import loader_chart  # with matplotlib, which the page does not need

    loader_chart.draw()
    PAGE.write_text(page(), encoding="utf-8")
