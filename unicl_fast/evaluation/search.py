"""Search of a packed data set by texts and by example images.

    model = unicl_fast.load_model("runs/first")
    with open_index(model, "packed/shop") as shop:
        shop.by_texts(["red apples"])[0][0].caption

A text is compared with the images, with the words that are predicted from them if the run's
training captions are at hand, with the titles (captions and class names) by the text encoder, and
with their words. Images and titles are encoded once, each batch straight into a file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float
from numpy.typing import NDArray

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import Description, SampleReader
from unicl_fast.distributed.ranks import Ranks, from_rank_0, rank_0_alone
from unicl_fast.evaluation.baselines import MOST_IMAGES, MOST_STORED, training_part
from unicl_fast.evaluation.choices import SIGNALS, Signal
from unicl_fast.evaluation.data import all_descriptions, open_data
from unicl_fast.evaluation.features import (
    LoadedModel,
    ModelOnRanks,
    encode_token_rows,
    require_layer,
    require_text_encoder,
)
from unicl_fast.evaluation.inference import ImageLike, Model
from unicl_fast.evaluation.nearest import Rows, best
from unicl_fast.evaluation.predicted import PredictedWords
from unicl_fast.evaluation.signals import Scores, fuse, kept_measure, measure, standardise
from unicl_fast.evaluation.words import Words
from unicl_fast.images.codec import encode_png, open_image, pixels_of
from unicl_fast.models.unicl import UniCL, weights_digest
from unicl_fast.system.atomic_files import temporary_folder
from unicl_fast.system.installation import install_command
from unicl_fast.training.data import open_datasets, tokenizer_of
from unicl_fast.training.kept_rows import kept_rows

logger = logging.getLogger("unicl_fast")

_TEXTS_AT_ONCE = 4096
_VERSION = 2  # of the stored features
_FEWEST_FRESH = 50  # whose mean reciprocal rank is known to 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """An image found by a search."""

    sample: int
    """Its number in the data set."""
    score: float
    """Cosine with the query; of several signals their mean, in deviations above the set's mean."""
    caption: str
    """The first one, or empty."""
    labels: tuple[str, ...]
    """Class names."""
    source: str
    """The list, folder or archive it was packed from."""
    name: str
    """Its path in the source."""
    others: int
    """How many further images its product has, by the key that it was packed with."""


class Titles:
    """The captions and class names of all samples, each distinct text once."""

    def __init__(self, of_samples: Sequence[Sequence[str]], captions: Sequence[int]) -> None:
        """`captions` is the number of captions of each, which come first; some sample has one."""
        numbers: dict[str, int] = {}
        flat = [numbers.setdefault(text, len(numbers)) for own in of_samples for text in own]
        self.number_of, self.texts = numbers, list(numbers)
        self.of_samples, self.captions = of_samples, captions
        lengths = np.array(list(map(len, of_samples)))
        self._numbers = np.array(flat)
        self._with = np.flatnonzero(lengths)
        self._starts = (np.cumsum(lengths) - lengths)[self._with]

    def per_sample(self, of_texts: Float[np.ndarray, "q t"]) -> Float[np.ndarray, "q n"]:
        """The largest value of each sample's texts; the mean for samples without."""
        values = np.maximum.reduceat(of_texts[:, self._numbers], self._starts, axis=1)
        found = np.empty((len(values), len(self.of_samples)), np.float32)
        found[:] = values.mean(axis=1, keepdims=True)
        found[:, self._with] = values
        return found


class SearchIndex:
    """A model, the features of a data set's images, and their titles."""

    report: Mapping[str, Any]
    """The result of `signals.measure`, and `recall_at_100` of the nearest images and titles."""

    def __init__(
        self,
        model: Model,
        dataset: PackedDataset,
        features: Float[np.ndarray, "n d"],
        *,
        titles: Titles | None = None,
        title_features: Float[np.ndarray, "t d"] | None = None,
        words: Words | None = None,
        predicted: tuple[PredictedWords, Float[np.ndarray, "n e"]] | None = None,
        groups: Sequence[str] = (),
    ) -> None:
        """Features have unit norm and the order of samples and texts, and can be mapped files.

        `predicted` brings its vectors of the images, `groups` their keys: of images with one key
        only the best is found.
        """
        self.model, self.dataset, self.titles = model, dataset, titles
        self.images = Rows(features)
        self.title_rows = None if title_features is None else Rows(title_features)
        self.predicted = None if predicted is None else (predicted[0], Rows(predicted[1]))
        self._words = words
        keys = (key or number for number, key in enumerate(groups or range(len(features))))
        numbers: dict[object, int] = {}
        self._groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        self._sizes = np.bincount(self._groups)
        has: dict[Signal, bool] = {
            "images": _encodes_texts(model.encoders),
            "predicted": predicted is not None,
            "titles": title_features is not None,
            "words": words is not None,
        }
        self.signals = [signal for signal in SIGNALS if has[signal]]
        self.report = {"weights": dict.fromkeys(SIGNALS, 1.0)}
        self._reader = SampleReader(dataset)

    def __len__(self) -> int:
        return len(self.images.rows)

    def by_texts(
        self, texts: Sequence[str], *, top: int = 12, by: Sequence[Signal] = SIGNALS
    ) -> list[list[Found]]:
        """The `top` images that fit each text best, best first.

        `by` are the signals used: images and titles compare features, words spelling. Those that
        the index lacks are left out; one alone ranks by its own scores.

        Raises ValueError if none is left, no texts are given, or top < 1.
        """
        if not (used := [signal for signal in self.signals if signal in by]):
            require_text_encoder(self.model.encoders, "search by texts")
            raise ValueError(f"the index has {self.signals}, of which by={list(by)} has none")
        if isinstance(texts, str) or not texts:
            raise ValueError("texts must be a list of texts, not empty: [text] for one")
        scores = self.scores(texts, used)
        if len(used) == 1:
            return self._best(scores[used[0]], top=top)
        return self._best(fuse(standardise(scores), self.report["weights"]), top=top)

    def by_images(self, images: Sequence[ImageLike], *, top: int = 12) -> list[list[Found]]:
        """The images most similar to others: paths, Pillow images or arrays.

        Raises as `Model.embed_images`.
        """
        return self._best(self.images.similarities(self.model.embed_images(images)), top=top)

    def scores(
        self,
        texts: Sequence[str],
        signals: Sequence[Signal],
        left_out: Sequence[tuple[Sequence[int], str]] = (),
    ) -> Scores:
        """The scores of each text with each sample, by signal.

        `left_out` has for each text samples of the same titles, or none, and a title, which they
        are compared without.
        """
        found: Scores = {}
        without = [(row, *one) for row, one in enumerate(left_out) if one[0]]
        if set(signals) & {"images", "titles"}:
            queries = self.model.embed_texts(texts, progress=False)
        if "images" in signals:
            found["images"] = self.images.similarities(queries)
        if "predicted" in signals and self.predicted is not None:
            model, rows = self.predicted
            found["predicted"] = rows.similarities(model.of_texts(texts))
        if "titles" in signals and self.titles is not None and self.title_rows is not None:
            of_texts = self.title_rows.similarities(queries)
            for row, _, title in without:
                of_texts[row, self.titles.number_of[title]] = of_texts[row].min()
            found["titles"] = self.titles.per_sample(of_texts)
        if "words" in signals and self._words is not None:
            found["words"] = np.stack([self._words.scores(text) for text in texts])
            for row, samples, title in without:
                assert self.titles is not None
                others = [one for one in self.titles.of_samples[samples[0]] if one != title]
                found["words"][row, samples] = self._words.score_of(texts[row], "\n".join(others))
        return found

    def weigh(self, file: Path, fresh: NDArray[np.int64]) -> None:
        """Measures the weights among `fresh` samples, or finds them in a file.

        Predicted words were fitted to the captions of the others. Few fresh ones: equal weights.
        """
        if (titles := self.titles) is None or len(self.signals) < 2:
            return
        own = [titles.of_samples[sample] for sample in fresh]
        if self.predicted is not None and sum(map(bool, own)) < _FEWEST_FRESH:
            logger.info("search: equal weights, since nearly all images were trained on")
            return

        def scores_of(texts: list[str], left_out: list[tuple[list[int], str]]) -> Scores:
            without = [(fresh[samples].tolist(), title) for samples, title in left_out]
            found = self.scores(texts, self.signals, without)
            return {signal: values[:, fresh] for signal, values in found.items()}

        make = partial(measure, own, [titles.captions[sample] for sample in fresh], scores_of)
        self.report = kept_measure(file, self.signals, make)

    def image_file(self, sample: int) -> bytes:
        """An image's JPEG, PNG or WebP file; raises DamagedSampleError, IndexError."""
        data = self.dataset.image_bytes(range(len(self))[sample], verify=True).tobytes()
        return encode_png(pixels_of(open_image(data))) if data.startswith(b"P6") else data

    def close(self) -> None:
        self._reader.close()

    def _best(self, scores: Float[np.ndarray, "q n"], *, top: int) -> list[list[Found]]:
        if top < 1:
            raise ValueError(f"top must be positive, not {top}")
        return [
            [self._describe(sample, float(own[sample])) for sample in self._distinct(own, top)]
            for own in scores
        ]

    def _distinct(self, scores: Float[np.ndarray, " n"], top: int) -> list[int]:
        """The best samples of the `top` best groups, best first."""
        count = top
        while True:
            samples = best(scores, count)
            _, first = np.unique(self._groups[samples], return_index=True)
            if len(first) >= top or count >= len(scores):
                found: list[int] = samples[np.sort(first)[:top]].tolist()
                return found
            count *= 4

    def _describe(self, sample: int, score: float) -> Found:
        description = self._reader.read_description(sample)
        names = self.dataset.manifest.class_names
        return Found(
            sample=sample, score=score, caption=next(iter(description.captions), ""),
            labels=tuple(names[label] for label in description.labels),
            source=description.source, name=description.name,
            others=int(self._sizes[self._groups[sample]]) - 1,
        )  # fmt: skip


@contextlib.contextmanager
def open_index(
    model: LoadedModel | ModelOnRanks, data: str | Path, *, folder: Path | None = None
) -> Iterator[SearchIndex]:
    """Encodes the images and titles that a folder does not have yet; all ranks call it.

    Only rank 0 can search by several signals, since it alone measures their weights.

    Args:
        model: from `unicl_fast.load_model`, or a model on ranks, which share the work.
        data: images, written as `--data` of `unicl-eval search`.
        folder: stores the features, visible to all ranks; None stores them until the index closes.

    Raises:
        ValueError: the model has no common space (trained by cross-entropy), stored features are
            damaged, or the data cannot be read.
        OSError: the folder cannot be written.
        EvaluationStopped: a stop was requested; raised on all ranks.
    """
    on_ranks = ModelOnRanks.of(model)
    ranks = on_ranks.ranks
    require_layer(on_ranks.model, "projection")
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_data(str(data), ranks=ranks, takes_loose=True))
        if folder is None:
            own = stack.enter_context(temporary_folder("unicl-index-"))
            folder = Path(from_rank_0(str(own), ranks))
        predicted = _predicted_words(on_ranks, opened.dataset, folder)
        key, rows = on_ranks.stored(opened.dataset, folder, layer="projection")
        described = all_descriptions(opened.dataset)
        titles = _titles_of(described, opened.dataset.manifest.class_names)
        title_key, title_rows = "", None
        if titles is not None and _encodes_texts(on_ranks.model):
            title_key, title_rows = _title_rows(on_ranks, titles, folder)
        words = _words_of(titles) if titles is not None and ranks.is_main else None
        index = SearchIndex(
            Model(on_ranks.model), opened.dataset, rows,
            titles=titles, title_features=title_rows, words=words,
            predicted=predicted, groups=[one.group for one in described],
        )  # fmt: skip
        stack.enter_context(contextlib.closing(index))
        with rank_0_alone(ranks):
            if ranks.is_main:
                queries = (rows if title_rows is None else title_rows)[:100]
                index.images.approximate(folder / f"{key}.faiss", queries)
                if index.title_rows is not None:
                    index.title_rows.approximate(folder / f"{title_key}.faiss", queries)
                learnt, every = "", [index.images, index.title_rows]
                fresh = np.arange(len(index))
                if index.predicted is not None:
                    learnt, found = index.predicted[0].digest(), index.predicted[1]
                    found.approximate(folder / f"{key}.{learnt}.faiss", found.rows[:100])
                    every.append(found)
                    fresh = _not_trained_on(on_ranks.model, opened.dataset)
                measured = _hash_of(key, title_key, learnt, xxhash.xxh3_64_hexdigest(fresh.data))
                index.weigh(folder / f"{measured}.search.json", fresh)
                recall = min(one.recall for one in every if one)
                index.report = {**index.report, "recall_at_100": recall}
        yield index


def _predicted_words(
    on_ranks: ModelOnRanks, dataset: PackedDataset, folder: Path
) -> tuple[PredictedWords, NDArray[Any]] | None:
    """Learns from a run's training captions if their images' features are stored; on rank 0."""
    ranks, words = on_ranks.ranks, None
    with rank_0_alone(ranks):
        if ranks.is_main and len(dataset) <= MOST_STORED:
            try:
                train = training_part(on_ranks.model).captioned()
                if not train.captions:
                    raise ValueError("the run was trained without captions")
                step = len(train.captions) // MOST_IMAGES + 1
                train = train.take(range(0, len(train.captions), step))
                words = PredictedWords(train.features, train.captions, folder)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                logger.info("no words are predicted from images: %s", error)
    if not from_rank_0(words is not None, ranks):
        return None
    key, rows = on_ranks.stored(dataset, folder, layer="encoder")
    with rank_0_alone(ranks):
        if words is None:
            return None
        vectors = kept_rows(
            folder, _hash_of(key, words.digest()), family=words.digest(),
            items=np.ascontiguousarray(dataset.samples["xxh3"]), width=rows.shape[1] + 1,
            encode=lambda new: [(np.array(new), words.of_images(rows[new]))], ranks=Ranks(),
        )  # fmt: skip
    return words, vectors


def _not_trained_on(model: UniCL, dataset: PackedDataset) -> NDArray[np.int64]:
    """Samples whose images are not in the run's training data."""
    with contextlib.ExitStack() as stack:
        trained, _ = open_datasets(model.config.data, verify=False)
        known = [stack.enter_context(one).samples["xxh3"] for one in trained]
        return np.flatnonzero(~np.isin(dataset.samples["xxh3"], np.concatenate(known)))


def _title_rows(on_ranks: ModelOnRanks, titles: Titles, folder: Path) -> tuple[str, NDArray[Any]]:
    """The key and the features of the texts."""
    model, ranks = on_ranks.model, on_ranks.ranks
    tokenizer = tokenizer_of(model.config)
    view = [tokenizer.vocabulary_hash, tokenizer.context_length]
    arithmetic = [model.config.efficiency.precision, model.device.type]
    family = _hash_of(weights_digest(model, "text_"), view, arithmetic)
    texts = [text.encode("utf-8", "surrogatepass") for text in titles.texts]
    items = np.array(list(map(xxhash.xxh3_64_intdigest, texts)), np.uint64)

    def encode(new: Sequence[int]) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        mine = new[ranks.rank :: ranks.world_size]
        for start in range(0, len(mine), _TEXTS_AT_ONCE):
            numbers = mine[start : start + _TEXTS_AT_ONCE]
            tokens = tokenizer.encode([titles.texts[number] for number in numbers])
            features = encode_token_rows(
                model, tokens, progress=on_ranks.progress, folder=on_ranks.text_folder
            )
            yield np.array(numbers), features.float().cpu().numpy()

    key = _hash_of(family, xxhash.xxh3_128_hexdigest(items.tobytes()))
    rows = kept_rows(
        folder, key, family=family, items=items, width=model.config.model.embed_dim,
        encode=encode, ranks=ranks,
    )  # fmt: skip
    return key, rows


def _hash_of(*facts: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([_VERSION, *facts]).encode())


def _titles_of(described: Sequence[Description], names: Sequence[str]) -> Titles | None:
    """Captions and class names; None if no sample has one."""
    of_samples = [
        tuple(dict.fromkeys([*one.captions, *(names[label] for label in one.labels)]))
        for one in described
    ]
    captions = [len(set(one.captions)) for one in described]
    return Titles(of_samples, captions) if any(of_samples) else None


def _encodes_texts(model: UniCL) -> bool:
    with contextlib.suppress(ValueError):
        require_text_encoder(model, "search")
        return True
    return False


def _words_of(titles: Titles) -> Words | None:
    if importlib.util.find_spec("sklearn") is None:
        logger.warning("words are not searched without scikit-learn: %s", install_command("search"))
        return None
    try:
        return Words(list(map("\n".join, titles.of_samples)))
    except ValueError:  # signs alone
        return None
