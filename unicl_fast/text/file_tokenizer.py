"""Tokenizers of other models, from their published tokenizer.json.

Hugging Face `tokenizers` runs the file, which holds data and no code, but can ask for any amount of
work: growth is bounded by its rules, all else by encoding a text in a limited child (0.2 CPU s).
Rows are padded with 0, as ours are, unless the model pads with another token, which it then reads.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from unicl_fast.system.child import Death, run_limited
from unicl_fast.system.untrusted_files import read_file, read_json
from unicl_fast.system.wording import shorten
from unicl_fast.text.tokenizer import CONTEXT_LENGTH, Tokenizer, text_groups, token_type

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CANONICAL = "#canonicalize"
"""Suffix of a place: texts first lose punctuation and capitals, as in big_vision."""
_TO_SPACE = str.maketrans({"_": " ", **dict.fromkeys(string.punctuation.replace("_", ""), "")})
_MOST_GROWTH = 100
"""Most characters that normalizing makes of one: SentencePiece's NFKC needs 18, and each regular
expression that inserts a space doubles the bound."""
_MOST_IDS = 1 << 24
_PROBED = ("normalizer", "pre_tokenizer", "post_processor")
_PROBE_BYTES, _PROBE_SECONDS = 1 << 30, 60.0
_PROBE = f"a photo of two {string.printable * 10} {'a' * 1000} {'x' * 1000}! \u0e01\ufdfa\u4e2d"


class FileTokenizer(Tokenizer):
    """A tokenizer from a file; `vocabulary_hash` is the SHA-256 of everything that affects ids."""

    def __init__(self, place: str, context_length: int, *, pads: bool = True) -> None:
        """Reads `place`, a folder or hf-hub:OWNER/NAME with TOKENIZER_FILES; CANONICAL may follow.

        Without `pads` rows end with their text, for encoders that mask padding. Raises
        FileNotFoundError if it is missing or cannot be downloaded, ValueError if it is damaged.
        """
        self.name = place
        self.context_length = context_length
        self._is_canonical = place.endswith(CANONICAL)
        file, settings = _find(place.removesuffix(CANONICAL))
        content = read_file(file)
        self._files = {TOKENIZER_FILES[0]: content}
        if settings is not None:
            self._files[TOKENIZER_FILES[1]] = read_file(settings)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(context_length)
        except Exception as error:  # the library raises no narrower kind
            raise ValueError(f"{file} is no tokenizer: {error}; copy it again") from error
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=0)  # vocabularies can have gaps
        self._growth = _growth_of(self._tokenizer.normalizer)
        if problem := self._find_problem():
            raise ValueError(f"{file} is not used: {problem}; take the one of its model")
        self.token_type = token_type(self.vocab_size)
        self._pad_id = self._find_pad_id(settings) if pads and settings is not None else 0
        decided_by = f"{self._is_canonical} {self._pad_id} ".encode() + content
        self.vocabulary_hash = hashlib.sha256(decided_by).hexdigest()

    def _find_problem(self) -> str:
        """Why the file would need too much memory or time; "" if it would not."""
        own = self._tokenizer
        growth = max(self._growth, _growth_of(own.decoder))
        if growth > _MOST_GROWTH:
            return f"its rules can make {growth:,} characters of one, and {_MOST_GROWTH} are usual"
        if self.vocab_size > _MOST_IDS:
            return f"its ids go up to {self.vocab_size - 1:,}"
        # without the vocabulary, which needs no probe and takes seconds to send
        parts = {name: _state(getattr(own, name)) for name in _PROBED}
        task = (parts, self.context_length)
        (found,) = run_limited(_probe, [task], memory_bytes=_PROBE_BYTES, seconds=_PROBE_SECONDS)
        return f"encoding an ordinary text {found.how}" if isinstance(found, Death) else found

    def _find_pad_id(self, file: Path) -> int:
        values = read_json(file)
        token = values.get("pad_token") if isinstance(values, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        return self._tokenizer.token_to_id(token) or 0 if isinstance(token, str) else 0

    def ends_in_largest(self) -> bool:
        """Whether texts, cut or not, have the largest id at their end, where padding may repeat."""
        words = max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
        rows = self.encode(["a", "a photo of a dog" * self.context_length])
        return all(row.max() >= words and len({*row[row.argmax() + 1 :]}) <= 1 for row in rows)

    def write(self, folder: Path) -> None:
        """Writes its files, with the context length for transformers, into a folder."""
        for name, content in self._files.items():
            values = json.loads(content) if name == TOKENIZER_FILES[1] else None
            if isinstance(values, dict):
                values["model_max_length"] = self.context_length
                content = json.dumps(values, indent=2, ensure_ascii=False).encode()
            (folder / name).write_bytes(content)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Token ids of each text with special tokens, cut to `context_length`.

        Unpadded, unless the model pads with another token than 0.
        """
        if isinstance(texts, str):
            raise TypeError("encode needs a list of texts; wrap a single text in a list")
        cleaned = [_canonical(text) for text in texts] if self._is_canonical else list(texts)
        rows = []
        for group in text_groups(cleaned, growth=self._growth):
            try:
                encodings = self._tokenizer.encode_batch_fast(group)
            except BaseException as error:  # a panic of the library is no Exception
                raise ValueError(f"{self.name}: {_panic_in(error)} on a text") from error
            for encoding in encodings:
                ids = encoding.ids
                if self._pad_id:
                    ids = ids + [self._pad_id] * (self.context_length - len(ids))
                rows.append(np.array(ids or [0], dtype=self.token_type))
        return rows

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The readable text of ids, without special tokens."""
        return str(self._tokenizer.decode([int(one) for one in ids], skip_special_tokens=True))


def _panic_in(error: BaseException) -> str:
    """Describes a panic of the library; raises any other error."""
    if type(error).__name__ != "PanicException":
        raise error
    return f"the tokenizer failed ({shorten(str(error), limit=200)})"


def _growth_of(part: Any) -> int:
    """The most characters that a normalizer or decoder makes of one; Unicode's forms count as 1."""

    def growth(rule: dict[str, Any]) -> int:
        if inside := rule.get("normalizers") or rule.get("decoders"):
            return math.prod(map(growth, inside))
        if charsmap := rule.get("precompiled_charsmap"):  # a trie, whose size stands first
            data = base64.b64decode(charsmap)
            texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
            return max(1, *(len(text.decode(errors="replace")) for text in texts))
        new = len(rule.get("content") or "") if rule["type"] == "Replace" else 0
        old = len(rule["pattern"].get("String", "")) if new else 0
        # a regular expression, or an empty text, also matches between two characters
        return max(1, math.ceil(new / old) if old else 1 + new + len(rule.get("prepend", "")))

    return 1 if part is None else growth(_state(part))


def _state(part: Any) -> Any:
    """The JSON of a normalizer or another part; not all can be pickled, Gemma's cannot (0.23)."""
    return None if part is None else json.loads(part.__getstate__())


def _probe(task: tuple[dict[str, Any], int]) -> str:
    """Encodes a text by all of a tokenizer but its vocabulary; returns a problem, or ""."""
    parts, length = task
    model = {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}
    nothing: Any = {"truncation": None, "padding": None, "added_tokens": [], "decoder": None}
    whole = json.dumps({"version": "1.0", "model": model} | nothing | parts)
    tokenizer = tokenizers.Tokenizer.from_str(whole)
    tokenizer.enable_truncation(length)
    try:
        size = len(tokenizer.encode_batch_fast([_PROBE])[0])
    except BaseException as error:
        return f"{_panic_in(error)} on an ordinary text"
    return f"a row has {size:,} tokens, and the context {length}" if size > length else ""


def _find(place: str) -> tuple[Path, Path | None]:
    """The paths of TOKENIZER_FILES; the second can be missing."""
    scheme, _, repository = place.partition(":")
    if scheme != "hf-hub":
        file, settings = (Path(place) / name for name in TOKENIZER_FILES)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is not there: the tokenizer of this model is needed for its texts; put "
                "the file there, or name a source that has it"
            )
        return file, settings if settings.is_file() else None
    from unicl_fast.system.hub import NotOnHubError, download  # 0.2 s

    try:
        file = download(repository, TOKENIZER_FILES[:1])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the tokenizer of this model is needed: {error}") from error
    try:
        return file, download(repository, TOKENIZER_FILES[1:])
    except NotOnHubError:
        return file, None


_file_tokenizer = functools.lru_cache(maxsize=8)(FileTokenizer)


def make_tokenizer(place: str, context_length: int, *, pads: bool = True) -> Tokenizer:
    """The tokenizer of `model.tokenizer`; arguments and errors are `FileTokenizer`'s."""
    if place:
        return _file_tokenizer(place, context_length, pads=pads)
    return Tokenizer(min(context_length, CONTEXT_LENGTH))


def _canonical(text: str) -> str:
    """Cleans a text as open_clip does for SigLIP."""
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.translate(_TO_SPACE).lower().split())
