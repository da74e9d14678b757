"""Search by words: a query's words, and those of the vocabulary that are written like them.

A plural, a part of a word (chair in armchair) and a typing error find the word, too, with a lower
score. This needs neither a stemmer, which knows one language, nor a model.
"""

import difflib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

_FEWEST_BYTES = 3  # of a part of a word, in UTF-8: three Latin letters, or one Chinese sign
_INSIDE = 0.8  # of a part that is not the beginning: hair in chair, chair in armchair
_MISSPELT, _LEAST_ALIKE = 0.9, 0.72  # of an unknown word; difflib gives cahirs and chair 0.73
_MOST_WORDS = 64  # of a query; each costs some milliseconds for each 10,000 words of the data
_COMPARED, _ALIKE = 50, 20  # words compared letter by letter; words used for one of the query
# Japanese has no blanks: words end where the script changes (kanji with their endings, katakana).
_WORD = r"[㐀-鿿々]+[ぁ-ゟ]*|[ァ-ヺー-ヿ]+|[ぁ-ゟ]{2,}|[^\W㐀-鿿々ぁ-ゟァ-ヺー-ヿ]{2,}|[가-힣]"


class Words:
    """The words of documents, each a text about one sample."""

    def __init__(self, documents: Sequence[str]) -> None:
        """ValueError if there is no word; ModuleNotFoundError without scikit-learn."""
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.preprocessing import normalize

        self._count = CountVectorizer(
            binary=True, strip_accents=_plain, token_pattern=_WORD, dtype=np.float32
        )
        rows = self._count.fit_transform(documents)
        self._has, self._brevity = rows.tocsc(), _brevity(np.diff(rows.indptr))
        self._split = self._count.build_analyzer()
        self._words: list[str] = self._count.get_feature_names_out().tolist()
        # rare words say more: the usual inverse document frequency
        num_documents, num_with = self._has.shape[0], np.diff(self._has.indptr)
        self._rarity = np.log((1 + num_documents) / (1 + num_with)) + 1
        self._grams = CountVectorizer(
            analyzer="char_wb", ngram_range=(1, 2), binary=True, dtype=np.float32
        )
        self._spelling = normalize(self._grams.fit_transform(self._words))

    def scores(self, query: str) -> Float[np.ndarray, " n"]:
        """The part of the query that each document has, in 0 to 1.

        Rare words count for more, and a short document for a little more than a long one.
        """
        scores = np.zeros(self._has.shape[0], np.float32)
        for weight, alike in self._weighted(query):
            found = np.zeros_like(scores)
            for number, value in sorted(alike.items(), key=lambda one: one[1]):
                found[self._has.indices[slice(*self._has.indptr[number : number + 2])]] = value
            scores += weight * found
        scores *= self._brevity
        return scores.clip(max=1)

    def score_of(self, query: str, document: str) -> float:
        """As `scores`, for one document of known words."""
        has = self._count.transform([document]).indices.tolist()
        found = sum(
            weight * max((alike.get(number, 0.0) for number in has), default=0.0)
            for weight, alike in self._weighted(query)
        )
        return float(found * _brevity(len(has)))

    def _weighted(self, query: str) -> list[tuple[float, dict[int, float]]]:
        """The weights of the query's words, of sum 1, with the words that are like each."""
        words = list(dict.fromkeys(self._split(query)))[:_MOST_WORDS]
        found = [alike for alike in map(self.alike, words) if alike]
        rarities = [float(self._rarity[max(alike, key=alike.__getitem__)]) for alike in found]
        total = sum(rarities)
        return [(rarity / total, alike) for rarity, alike in zip(rarities, found, strict=True)]

    def alike(self, word: str) -> dict[int, float]:
        """Numbers of words like one, and how alike, in 0 to 1; 1 is the word itself."""
        found = {}
        for number, other in enumerate(self._words):
            short, long = (word, other) if len(word) <= len(other) else (other, word)
            part = len(short) / len(long)
            is_long = len(short.encode()) >= _FEWEST_BYTES or part == 1
            # a word within the query's has to be most of it
            if is_long and (short == word or part > 0.5) and short in long:
                found[number] = (1 + part) / 2 * (1 if long.startswith(short) else _INSIDE)
        if not found:
            near = (self._spelling @ self._grams.transform([word]).T).toarray()[:, 0]
            for number in np.argsort(-near, kind="stable")[:_COMPARED].tolist():
                ratio = difflib.SequenceMatcher(None, word, self._words[number]).ratio()
                if ratio >= _LEAST_ALIKE:
                    found[number] = _MISSPELT * ratio
        return dict(sorted(found.items(), key=lambda one: -one[1])[:_ALIKE])


def _plain(text: str) -> str:
    """The text without accents and widths; voiced signs tell ガラス (glass) from カラス (crow)."""
    parts = unicodedata.normalize("NFKD", text)
    kept = (one for one in parts if one in "\u3099\u309a" or not unicodedata.combining(one))
    return unicodedata.normalize("NFC", "".join(kept))


def _brevity(num_words: Any) -> Any:
    """Orange comes before orange juice: 1 for a word, 0.8 for many."""
    return 0.8 + 0.2 / np.maximum(num_words, 1)
