"""One word for one thing, and docstrings that are sentences.

The field's words are in CONTRIBUTING.md. A few lines here keep the retired ones out, in code,
messages, help and documentation.
"""

import ast
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

# retired word -> the field's
RETIRED = {
    r"pictures?": "image",
    r"visit(s|ed)?": "draw",
    r"slots?(?!=True)": "global index",
    r"(goes|go|going|went|gone) on(?! (a|an|the|to|from|with) )": "resumes, continues",
    r"(is |be )?gone back to": "resumes from",
    r"processor (time|seconds?)": "CPU time",
    r"(images|samples|steps|texts|batches|sentences|captions) a second": "images/s",
    r"pass(es)? (over|through) (the|a|its|all|each) data": "epoch",
    r"(a |its |rank's )?share of (the|a|its|each) (global )?batch": "local batch",
    r"culprits?|furnish\w*|whole_file\w*|sealed\w*": "see CONTRIBUTING.md",
    r"one likes|without a word": "a plain sentence",
}
_RETIRED = re.compile("|".join(rf"\b(?:{word})\b" for word in RETIRED), re.IGNORECASE)
_FRAGMENT = re.compile(r"(Of|What|Who|Where|Which)\b")

ROOMS = sorted(
    {path.parent for path in (CHECKOUT / "unicl_fast").rglob("*.py")}
    | {
        path.parent
        for room in ("pipelines", "tools", "benchmarks")
        for path in (CHECKOUT / room).rglob("*.py")
    }
)
TEXTS = [
    CHECKOUT / "README.md",
    CHECKOUT / "CONTRIBUTING.md",
    *sorted((CHECKOUT / "docs").glob("*.md")),
]


def name_of(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


def retired_words(path: Path) -> list[str]:
    return [
        f"{name_of(path)}:{number}: {found[0]!r}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for found in _RETIRED.finditer(line)
    ]


def docstrings(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and text of each docstring of a module, class, function or field."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    return [
        (statement.lineno, statement.value.value)
        for statement in (statement for body in bodies for statement in body)
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_a_room_speaks_the_field_s_words_in_sentences(room):
    wrong = []
    for path in sorted(room.glob("*.py")):
        wrong += retired_words(path)
        for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            if found := _FRAGMENT.match(text.lstrip()):
                wrong.append(f"{name_of(path)}:{line}: a docstring begins with {found[0]!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_a_text_speaks_the_field_s_words(path):
    assert not (wrong := retired_words(path)), "\n".join(wrong)
