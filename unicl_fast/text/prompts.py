"""Class names x templates -> prompts, their token table, and the training class of each.

Prompts are tokenised once at the start of a run; drawing one then reads a row. The table also finds
captions that are prompts, and merges classes that share a prompt.
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.system.atomic_files import locked, replacing
from unicl_fast.system.wording import count_of
from unicl_fast.text.class_lists import check_templates, fill_template
from unicl_fast.text.token_rows import (
    Int64Array,
    TokenArray,
    find_rows,
    hash_rows,
    make_table,
    merge_classes,
    position_factors,
    replace_classes,
    unique_rows,
)
from unicl_fast.text.tokenizer import Tokenizer, pad_rows

_log = logging.getLogger(__name__)

LABEL_BITS = 32
"""A class id is `source << LABEL_BITS | label`: the data set's number and the int32 label."""
_LABELS_END = 1 << 31
_GROUPS_SHOWN = 3
_FEWEST_CACHED = 10_000  # fewer prompts are tokenised in a fraction of a second
_MOST_FILES = 8
"""The most recently used files that a cache keeps; 87 MB for 21,841 classes and 80 templates."""


class ClassPrompts:
    """The prompts of all classes of all sources as one table of tokens.

    A class id is a label prefixed by its source (see `LABEL_BITS`), so sources without class names
    can have labels too. Classes that share a prompt are merged under the smallest id, so equal rows
    of `tokens` always have equal `class_ids`.

    Attributes:
        tokens: uint16 or uint32 [rows, l], all prompts, padded with 0 to the longest one's length.
        class_ids: int64 [rows], the training class of each prompt.
        first_prompt_rows: int64 [sources], the row of each source's first prompt; the others follow
            by label, then by template.
        num_classes: int64 [sources], 0 for a source without class names.
        num_templates: int64 [sources], 0 for a source without class names.
        merged_classes: groups of merged classes, each a tuple of (source, label), smallest first.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[str], Sequence[str]]],
        tokenizer: Tokenizer,
        *,
        cache_folder: Path | None = None,
    ) -> None:
        """Tokenises all prompts (about 2 s for ImageNet's 80,000) and merges classes.

        Args:
            sources: class names and templates of each source; both empty if it has captions only.
            tokenizer: the captions' tokenizer.
            cache_folder: keeps the token rows of many prompts for the next start and the other
                ranks of this machine; None keeps nothing.

        Raises ValueError: class names without templates, or a template without exactly one "{}".
        """
        for source, (names, templates) in enumerate(sources):
            if names:
                check_templates(tuple(templates), origin=f"the templates of source {source}")
        self._names = [tuple(names) for names, _ in sources]
        self.num_classes = np.array([len(names) for names, _ in sources], dtype=np.int64)
        self.num_templates = np.array(
            [len(templates) if names else 0 for names, templates in sources], dtype=np.int64
        )
        num_rows = self.num_classes * self.num_templates
        self.first_prompt_rows = np.cumsum(num_rows) - num_rows

        def make() -> TokenArray:
            encoded = tokenizer.encode(
                [
                    fill_template(template, name)
                    for names, templates in sources
                    for name in names
                    for template in templates
                ]
            )
            longest = max(map(len, encoded), default=0)
            rows: TokenArray = pad_rows(encoded, longest, tokenizer.token_type)
            return rows

        if cache_folder is None or num_rows.sum() < _FEWEST_CACHED:
            self.tokens = make()
        else:
            self.tokens = _read_or_make(cache_folder / _file_name(sources, tokenizer), make)
        self._merge()

    def rows_of(
        self, source: int, labels: npt.ArrayLike, templates: npt.ArrayLike
    ) -> npt.NDArray[np.int64]:
        """Rows of `tokens` for labels and templates of one source, broadcast; or ValueError."""
        labels, templates = np.asarray(labels), np.asarray(templates)
        num_classes, num_templates = self.num_classes[source], self.num_templates[source]
        ends = {"labels": (labels, num_classes), "templates": (templates, num_templates)}
        for what, (values, end) in ends.items():
            if values.size and not 0 <= values.min() <= values.max() < end:
                raise ValueError(
                    f"{what} of source {source} must lie in 0 to {end - 1} "
                    f"({count_of(num_classes, 'class name')}, "
                    f"{count_of(num_templates, 'template')}), "
                    f"not {values.min()} to {values.max()}"
                )
        rows = self.first_prompt_rows[source] + labels.astype(np.int64) * num_templates + templates
        return np.asarray(rows, dtype=np.int64)

    def classes_of(self, source: int, labels: npt.ArrayLike) -> Int64Array:
        """Training classes of labels of one source; -1 (none) stays -1. ValueError out of range."""
        ids = np.asarray(labels, dtype=np.int64)
        if ids.size and not -1 <= ids.min() <= ids.max() < _LABELS_END:
            raise ValueError(
                f"labels must lie in -1 to {_LABELS_END - 1}, not {ids.min()} to {ids.max()}"
            )
        ids = np.where(ids >= 0, ids + source * (1 << LABEL_BITS), ids)
        return replace_classes(ids, self._members, self._merged)

    def lookup(self, rows: TokenArray) -> Int64Array:
        """The class, int64 [k], of each text [k, any length] (padded with 0) as a prompt, or -1."""
        expected = self.tokens.dtype
        if rows.ndim != 2 or not np.can_cast(rows.dtype, expected):
            raise ValueError(f"rows must be {expected} [k, l], not {rows.dtype} {list(rows.shape)}")
        rows = np.ascontiguousarray(rows, expected)
        hashes = hash_rows(rows, position_factors(rows.shape[1]))
        found = find_rows(rows, hashes, self._table, self._distinct)
        return self._class_of_distinct[found]

    def _merge(self) -> None:
        """Finds equal prompts, merges their classes, and fills the hash table."""
        hashes = hash_rows(self.tokens, position_factors(self.tokens.shape[1]))
        self._table = make_table(len(self.tokens))
        first, index, _, self._distinct, _ = unique_rows(self.tokens, hashes, self._table)
        counts = zip(self.num_classes, self.num_templates, strict=True)
        blocks = [
            np.repeat(np.arange(classes) + source * (1 << LABEL_BITS), templates)
            for source, (classes, templates) in enumerate(counts)
        ]
        class_ids = np.concatenate([np.empty(0, dtype=np.int64), *blocks])
        claimed = class_ids[first][index]
        differs = claimed != class_ids
        pairs = np.stack([claimed[differs], class_ids[differs]], axis=1)
        self._members, self._merged = merge_classes(pairs)
        self.class_ids = replace_classes(class_ids, self._members, self._merged)
        self._class_of_distinct = np.append(self.class_ids[first], -1)  # found[-1] is "no prompt"
        self.merged_classes = self._describe_merged()

    def _describe_merged(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Computes `merged_classes`, and logs the first few groups."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for member, merged in zip(self._members.tolist(), self._merged.tolist(), strict=True):
            groups.setdefault(merged, []).append(divmod(member, 1 << LABEL_BITS))
        shown = [
            " = ".join(
                f"{self._names[source][label]!r} (source {source}, label {label})"
                for source, label in group
            )
            for group in itertools.islice(groups.values(), _GROUPS_SHOWN)
        ]
        if more := len(groups) - len(shown):
            shown.append(f"and {more:,} more, all of which are in ClassPrompts.merged_classes")
        if shown:
            _log.info(
                "classes that have a prompt in common are one class in training, %s of them: %s",
                count_of(len(groups), "group"), "; ".join(shown),
            )  # fmt: skip
        return tuple(tuple(group) for group in groups.values())


def _file_name(sources: Sequence[tuple[Sequence[str], Sequence[str]]], tokenizer: Tokenizer) -> str:
    """Names token rows by everything that affects them, including the code that makes them."""
    words = [[list(names), list(templates)] for names, templates in sources]
    packages = [f"{name} {version(name)}" for name in ("ftfy", "regex", "tokenizers")]
    decided_by = [words, tokenizer.vocabulary_hash, tokenizer.context_length, packages]
    digest = hashlib.sha256(json.dumps(decided_by).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"prompts-{digest.hexdigest()[:32]}"


def _read_or_make(path: Path, make: Callable[[], TokenArray]) -> TokenArray:
    """Reads token rows from a cache; one process of a machine makes them while others wait."""
    rows = None
    try:
        rows = _read_rows(path)
        if rows is not None:
            return rows
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name("prompts.lock"), wait=True):
            rows = _read_rows(path)  # from the previous holder of the lock
            if rows is None:
                rows = make()
                _write_rows(path, rows)
    except OSError as error:
        _log.warning("the token rows of prompts cannot be kept, every start makes them: %s", error)
    return make() if rows is None else rows


def _read_rows(path: Path) -> TokenArray | None:
    """None if the file is missing or damaged."""
    with contextlib.suppress(FileNotFoundError):
        content = memoryview(path.read_bytes())
        if xxhash.xxh3_64_digest(content[8:]) == content[:8]:
            with contextlib.suppress(OSError):
                os.utime(path)  # marks it as used
            rows: TokenArray = np.load(io.BytesIO(content[8:]), allow_pickle=False)
            return rows
        _log.warning("%s is damaged; its token rows are made anew", path)
    return None


def _write_rows(path: Path, rows: TokenArray) -> None:
    """Writes rows as a .npy file behind its checksum; removes the least recently used files."""
    # the lock is held, so partial files are left from crashes
    for partial in path.parent.glob(".prompts-*.partial"):
        partial.unlink(missing_ok=True)
    content = io.BytesIO()
    np.save(content, rows, allow_pickle=False)
    with replacing(path, flush=False) as aside:
        aside.write_bytes(xxhash.xxh3_64_digest(content.getbuffer()) + content.getbuffer())
    files = sorted(path.parent.glob("prompts-*"), key=lambda file: file.stat().st_mtime)
    for old in files[:-_MOST_FILES]:
        old.unlink(missing_ok=True)
