"""Values in messages and tables: counts, shortened values, URLs without secrets, differences."""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

_ABSENT = object()
_MOST_MESSAGE = 4000
_PLURAL = re.compile(r"\b(file|image|row|download)s\b")
# each word is tried from its start only, or a text of 300 kB without blanks would take minutes
_SCHEME = r"(?<![A-Za-z0-9+.\-])[A-Za-z0-9+.\-]+://"
# user:password, and with http a token alone; abfs://container@account names no user
_USER = re.compile(rf"({_SCHEME})[^/\s?#@:]*:[^/\s?#]*@|(https?://)[^/\s?#]*@")
_MARKUP = re.compile(r"[\\|<&$*`\[]")
_QUERY = re.compile(rf"({_SCHEME}[^\s?]*)\?[^\s'\",;)]+")


def count_of(number: int, noun: str) -> str:
    """Formats a count: `1 class`, `2,000 classes`, `3 entries`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    if noun.endswith("y"):
        plural = f"{noun[:-1]}ies"
    return f"{number:,} {noun if number == 1 else plural}"


def count_of_kind(number: int, kind: str) -> str:
    """Formats a count with a plural: `1 hidden file`, `2 hidden files` of "hidden files"."""
    if number == 1:
        kind = _PLURAL.sub(r"\1", kind, count=1)
    return f"{number:,} {kind}"


def shorten(value: Any, *, limit: int = 100) -> str:
    """Returns the first `limit` characters of `repr(value)`."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a number of over 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."


def without_secrets(text: str) -> str:
    """Removes user, password and query (signatures, tokens) from the URLs in a text."""
    text = _USER.sub(lambda match: match[1] or match[2], text)
    return _QUERY.sub(r"\1?...", text)


def encodable(text: str) -> str:
    """Escapes bytes of file names that are not UTF-8, which protobuf and matplotlib refuse."""
    return text.encode(errors="backslashreplace").decode()


def visible_text(text: str) -> str:
    """Escapes control characters other than line feeds, and bytes that are not UTF-8."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in ("Cc", "Cs")
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shorten_message(text: str) -> str:
    """Cuts the middle out of a message that quotes something long: a text, a list, a file."""
    left_out = len(text) - _MOST_MESSAGE
    if left_out <= 0:
        return text
    half = _MOST_MESSAGE // 2
    return f"{text[:half]} ... ({left_out:,} characters) ... {text[-half:]}"


def print_text(text: str, file: TextIO) -> None:
    """Prints a text with any names: control characters are escaped, URLs lose their secrets."""
    encoding = file.encoding or "utf-8"
    shown = visible_text(without_secrets(text))
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=file)


def markdown_text(text: str) -> str:
    """Returns a text in one line, with the markup of Markdown and HTML escaped."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table, aligned for reading as text, the first column left; escapes the cells."""
    cells = [[markdown_text(cell) for cell in row] for row in (header, *rows)]
    widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    rule[0] = rule[0][::-1]
    lines = [
        " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join(f"| {line} |" for line in lines)


def refuse_differences(what: str, stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first difference, if a checkpoint has another `what`."""
    if differences := list(config_diff(stored, present)):
        more = len(differences) - 1
        also = f" ({count_of(more, 'more difference')})" if more else ""
        raise ValueError(
            f"the checkpoint is of another {what}: {differences[0]}{also}; train into another "
            "--out, or give what the checkpoint was trained with"
        )


def config_diff(
    stored: Any, present: Any, path: str = "", *, says: str = "{} was {} and is now {}"
) -> Iterator[str]:
    """Yields a phrase for each element that differs: "shares[1] was 0.5 and is now 0.25".

    `says` has places for its path and both values.
    """
    if isinstance(stored, Mapping) and isinstance(present, Mapping):
        for name in sorted(set(stored) | set(present)):
            below = f"{path}.{name}" if path else name
            pair = stored.get(name, _ABSENT), present.get(name, _ABSENT)
            yield from config_diff(*pair, below, says=says)
    elif isinstance(stored, list | tuple) and isinstance(present, list | tuple):
        pairs = enumerate(itertools.zip_longest(stored, present, fillvalue=_ABSENT))
        inner = [
            phrase for n, pair in pairs for phrase in config_diff(*pair, f"{path}[{n}]", says=says)
        ]
        if len(stored) == len(present):
            yield from inner
        else:  # one inserted element moves all others: the first difference helps
            lengths = (f"a list of {len(one)}" for one in (stored, present))
            yield f"{says.format(path, *lengths)}, and {inner[0]}"
    elif stored != present or isinstance(stored, bool) != isinstance(present, bool):
        yield says.format(path, _show(stored), _show(present))


def _show(value: Any) -> str:
    return "not there" if value is _ABSENT else shorten(value, limit=200)
