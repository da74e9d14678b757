"""Text -> token ids: CLIP's byte-pair encoding, with exactly the ids of `open_clip.tokenize`.

Hugging Face `tokenizers` (Rust) merges pairs. The cleaning before it decides whether ids are equal,
and uses open_clip's libraries: ftfy, HTML entities, `lower()`, and `regex`'s letters and digits.
Importing this module imports neither torch nor open_clip, for packing workers.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from unicl_fast.text.class_lists import installed_file

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT_LENGTH = 77
_START, _END = "<start_of_text>", "<end_of_text>"
_WORD_END = "</w>"
_SPACE = "\u0120"  # in the byte-level encoding
_NUM_MERGES = 49152 - 256 - 2
"""The file has more merges than CLIP uses: 2 x 256 bytes, these, and 2 markers make 49,408."""

_ENCODED_AT_ONCE = 4096
_CHARACTERS_AT_ONCE = 1_000_000
"""Most texts and characters in one call: the library's result is many times as large as the ids,
140 bytes for each character."""


class Tokenizer:
    """CLIP's tokenizer: `tokenizer(["a photo"])` for an encoder, `encode` for storing.

    It can be pickled. `encode` uses the Rust library's threads unless the environment variable
    TOKENIZERS_PARALLELISM is "false".
    """

    name = "clip-bpe"
    token_type: np.dtype[Any] = np.dtype(np.uint16)
    vocabulary_hash: str
    """SHA-256 of the merges: equal hashes give equal ids."""

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        if context_length < 2:
            raise ValueError(
                f"context_length must hold at least the start and end tokens, not {context_length}"
            )
        self.context_length = context_length
        self.vocabulary_hash = vocabulary_hash()
        self.vocab_size = 2 * 256 + _NUM_MERGES + 2
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1

    @property
    def _bpe(self) -> tokenizers.Tokenizer:
        return _load_encoding()

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Ids of each text, unpadded: start token, text cut to `context_length`, end token."""
        if isinstance(texts, str):
            raise TypeError("encode needs a list of texts; wrap a single text in a list")
        room = self.context_length - 2
        rows = []
        for group in text_groups(texts):
            cleaned = [_clean(text) for text in group]
            encodings = self._bpe.encode_batch_fast(cleaned, add_special_tokens=False)
            for text, encoding in zip(cleaned, encodings, strict=True):
                ids = self._encode_with_markers(text) if "_of_text>" in text else encoding.ids
                rows.append(np.array([self.start_id, *ids[:room], self.end_id], dtype=np.uint16))
        return rows

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Token ids for an encoder, int64 [number of texts, context_length], padded with 0.

        A `FileTokenizer` pads as its model expects.
        """
        import torch  # here, since packing workers never load it

        rows = self.encode([texts] if isinstance(texts, str) else texts)
        return torch.from_numpy(pad_rows(rows, self.context_length, np.int64))

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The readable text of ids: lower case, words separated by spaces.

        The start token is left out; reading stops at the first end token, so that padding (the id
        of "!") is not read as text. An unknown id raises ValueError.
        """
        text = list(itertools.takewhile(lambda token: token != self.end_id, map(int, ids)))
        if unknown := [token for token in text if not 0 <= token < self.vocab_size]:
            raise ValueError(f"token ids lie in 0 to {self.vocab_size - 1}, not {unknown[0]}")
        return str(self._bpe.decode([token for token in text if token != self.start_id])).strip()

    def _encode_with_markers(self, text: str) -> list[int]:
        """Ids of a cleaned text that may spell out a marker: as a word it has a special id."""
        # `tokenizers` would cut out added tokens before any other rule, also in "!<end_of_text>"
        markers = {_START: self.start_id, _END: self.end_id}
        ids: list[int] = []
        for word, _ in self._bpe.pre_tokenizer.pre_tokenize_str(text):
            if word in markers:
                ids.append(markers[word])
            else:
                ids.extend(token.id for token in self._bpe.model.tokenize(word))
        return ids


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The type of token rows: uint16 up to 65,536 tokens, uint32 beyond."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def pad_rows(rows: Sequence[npt.NDArray[Any]], length: int, dtype: npt.DTypeLike) -> Any:
    """Rows of token ids as one array [number of rows, length], padded with 0."""
    padded = np.zeros((len(rows), length), dtype)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row
    return padded


def text_groups(texts: Sequence[str], *, growth: int = 1) -> Iterator[list[str]]:
    """Groups texts for one call each, in order; normalizing makes them `growth` times as long."""
    group: list[str] = []
    num_characters = 0
    for text in texts:
        num_characters += len(text) * growth
        if group and (len(group) == _ENCODED_AT_ONCE or num_characters > _CHARACTERS_AT_ONCE):
            yield group
            group, num_characters = [], len(text) * growth
        group.append(text)
    if group:
        yield group


def _clean(text: str) -> str:
    """Cleans a text as open_clip does before splitting it, up to white space between words."""
    # for printable ASCII without "&" ftfy and `unescape` have nothing to do
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.lower()
    import ftfy  # here, as `regex` below: a tenth of a second, which --help need not wait for

    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    # split() also drops characters that are white space only to Python (U+001C to U+001F)
    return " ".join(repaired.split()).lower()


def read_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary, token -> id in order, and its merges in order of rank."""
    merges = [(left, right) for left, right in map(str.split, _read_pairs())]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())  # not in byte order
    tokens = [*characters, *(character + _WORD_END for character in characters)]
    tokens += [*(left + right for left, right in merges), _START, _END]
    return {token: index for index, token in enumerate(tokens)}, merges


@functools.cache
def vocabulary_hash() -> str:
    """`Tokenizer.vocabulary_hash`, without building a tokenizer."""
    return hashlib.sha256("\n".join(_read_pairs()).encode()).hexdigest()


@functools.cache
def _load_encoding() -> tokenizers.Tokenizer:
    """The encoding, 60 MB while it is built."""
    vocabulary, merges = read_vocabulary()
    bpe = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=_WORD_END)
    )
    words = pre_tokenizers.Split(tokenizers.Regex(_word_pattern()), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    ends = decoders.Replace(_WORD_END, _SPACE)
    bpe.decoder = decoders.Sequence([ends, decoders.ByteLevel()])
    return bpe


def _read_pairs() -> list[str]:
    """CLIP's byte pairs, "LEFT RIGHT", in order of rank, from open_clip's vocabulary file."""
    path = installed_file(
        "open_clip",
        "bpe_simple_vocab_16e6.txt.gz",
        missing="the tokenizer reads its vocabulary from the package open_clip_torch; "
        "install it with: pip install open_clip_torch",
    )
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n", _NUM_MERGES + 1)
    pairs = lines[1 : _NUM_MERGES + 1]
    if len(pairs) != _NUM_MERGES or any(len(pair.split()) != 2 for pair in pairs):
        raise ValueError(f"{path} does not hold {_NUM_MERGES} pairs; reinstall open_clip_torch")
    return pairs


@functools.cache
def _word_pattern() -> str:
    """CLIP's pattern for words, with character classes spelled out as ranges.

    Rust's regular expressions have another Unicode version than open_clip's `regex`, so the ranges
    are read from `regex` (about 0.1 s, once a process). The pattern ignores case, which in
    lower-case text concerns two characters: the long s (U+017F) equals "s", and U+0345 is a letter
    because it equals a small iota.
    """
    import regex

    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))

    def ranges(character_class: str) -> str:
        runs = regex.finditer(f"{character_class}+", everything, flags=regex.IGNORECASE)
        spans = ((match.group()[0], match.group()[-1]) for match in runs)
        return "".join(f"\\x{{{ord(first):X}}}-\\x{{{ord(last):X}}}" for first, last in spans)

    letters, digits = ranges(r"[\p{L}]"), ranges(r"[\p{N}]")
    others = ranges(r"[^\s\p{L}\p{N}]")
    return (
        "<[s\u017f]tart_of_text>|<end_of_text>|'[s\u017f]|'t|'re|'ve|'m|'ll|'d"
        f"|[{letters}]+|[{digits}]|[{others}]+"
    )
