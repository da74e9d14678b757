"""Search by texts and images: by several signals, bounded in memory, and encoded once."""

import json
import sys
import unicodedata
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pack_runs import build_set, jpeg
from small_runs import objective_config, tiny_config

from unicl_fast import Model
from unicl_fast.checkpoints.load import build_model
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation import features, nearest, search
from unicl_fast.evaluation.nearest import Rows, best, similarities
from unicl_fast.evaluation.predicted import PredictedWords
from unicl_fast.evaluation.search import SearchIndex, Titles, open_index
from unicl_fast.evaluation.signals import fuse, measure, standardise, typed
from unicl_fast.evaluation.words import Words


class Watched(np.ndarray):
    """Remembers the most rows that were read at once."""

    most = 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = np.asarray(self)[rows]
        self.most = max(self.most, len(found))
        return found


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("top", [1, 7, 500])
def test_blocks_find_what_a_sort_finds(top, monkeypatch):
    monkeypatch.setattr(nearest, "_BLOCK_BYTES", 4 * 6 * 30)
    generator = np.random.default_rng(0)
    queries, rows = (generator.normal(size=(n, 6)).astype(np.float32) for n in (3, 200))
    rows[150] = rows[20]  # the first of equal ones comes first
    queries[0] = rows[20]
    kept = rows.view(Watched)
    scores = similarities(queries, kept)
    places = np.stack([best(one, top) for one in scores])
    values = np.take_along_axis(scores, places, axis=1)
    order = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :top]
    assert places.tolist() == order.tolist()
    expected = np.take_along_axis(queries @ rows.T, order, axis=1)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert kept.most == 30


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(build_model(tiny_config(precision="fp32")))


@pytest.mark.dali
def test_images_are_encoded_once_and_found_by_texts_and_images(model, data, tmp_path, monkeypatch):
    with open_index(model, data / "captions", folder=tmp_path) as index:
        (first, second) = index.by_texts(["two dogs", "a red car"], top=3)
        files = [tmp_path / "query", tmp_path / "other"]
        for number, file in enumerate(files):
            file.write_bytes(index.image_file(number))
        expected = model.embed_images([tmp_path / "query"]) @ model.embed_texts(["two dogs"]).T
        scores = {
            one.sample: one.score for one in index.by_texts(["two dogs"], top=99, by=["images"])[0]
        }
        assert len(scores) == len(index) == 20
        assert scores[0] == pytest.approx(expected.item(), abs=1e-3)
        by_image = index.by_images(files, top=2)
        assert [found[0].score for found in by_image] == pytest.approx([1, 1], abs=1e-3)
        with pytest.raises(ValueError, match="top must be positive"):
            index.by_texts(["a"], top=0)
        with pytest.raises(IndexError):
            index.image_file(20)
    assert [one.score for one in first] == sorted((one.score for one in first), reverse=True)
    assert first[0].caption
    assert first[0].name.endswith(".jpg")
    kept = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(features, "encode_images", None)
        with open_index(model, data / "captions", folder=tmp_path) as index:
            (again,) = index.by_texts(["a red car"], top=3)
    assert [one.sample for one in again] == [one.sample for one in second]
    assert set(tmp_path.iterdir()) == kept
    images, _ = sorted(tmp_path.glob("*.npy"), key=lambda path: path.stat().st_size)
    images.write_bytes(images.read_bytes()[:-1] + b"x")
    without = Model(build_model(objective_config("ce")).double())
    for one, said in ((model, "are damaged"), (without, "no projection")):
        with pytest.raises(ValueError, match=said):
            open_index(one, data / "captions", folder=tmp_path).__enter__()
    with open_index(model, data / "classes") as index:  # kept nowhere
        assert index.by_texts(["a cat"], top=1)[0][0].labels


@pytest.mark.dali
def test_of_a_product_s_images_only_the_best_is_found(model, tmp_path):
    """Also after the packed data set is packed again; images without a key form no group."""
    names = ["tan", "grey", "red", "plum", "blue", "teal", "pink", "navy", "lime", "gold", "black"]
    keys = [*["7", 7, "\uff17 "], *["8"] * 5, None, "", "9"]
    rows = []
    for number, (name, key) in enumerate(zip(names, keys, strict=True)):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
        rows.append({"image": f"{number}.jpg", "caption": f"coat {name}", "sku": key})
    (tmp_path / "shop.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build_set([tmp_path / "shop.jsonl"], tmp_path / "first", group_column="sku")
    build_set([tmp_path / "first"], tmp_path / "again")
    for data in ("first", "again"):
        with open_index(model, tmp_path / data, folder=tmp_path / "features") as index:
            (scores,) = index.scores(["coat blue"], ["words"])["words"]
            assert len(scores) == len(keys)
            (found,) = index.by_texts(["coat blue"], by=["words"], top=5)
            assert (found[0].caption, found[0].score) == ("coat blue", scores.max())
            assert sorted(one.others for one in found) == [0, 0, 0, 2, 4]
            (found,) = index.by_images([tmp_path / "1.jpg"], top=99)
            assert (found[0].caption, found[0].others, len(found)) == ("coat grey", 2, 5)
            assert len(index.by_texts(["coat"], top=2)[0]) == 2


TITLES = (
    "Red wooden chair", "Leather armchair", "Kitchen table", "Sofa for three", "Soft teddy bear",
    "Curtain rail", "Two chairs and a table", "Hairbrush", "Bürostuhl aus Holz",
)  # fmt: skip


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("chair", [0, 6, 1]),
        ("chairs", [6, 0]),
        ("CHAIR red", [0, 6, 1]),
        ("cahirs", [6, 0]),
        ("chiar", [0]),
        ("armchairs", [1]),
        ("tables", [2, 6]),
        ("teddys", [4]),
        ("sofas", [3]),
        ("buro", [8]),
        ("kitchen tabel", [2, 6]),
        ("brush", [7]),
        ("zebra", []),
        ("!", []),
    ],
)
def test_words_find_plurals_parts_of_words_and_typing_errors(query, found):
    scores = Words(TITLES).scores(query)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert [row for row in best(scores, 5).tolist() if scores[row] > 0][: len(found)] == found
    assert bool(scores.any()) == bool(found)


FOREIGN = (
    "Kleiderschrank aus Eiche", "Bürostuhl mit Rollen", "Esstisch für sechs Personen",
    "Glastür", "Große Straßenlaterne", "Müllsack", "赤い三人掛けソファ", "木製の机",
    "ガラスのテーブル", "カラスの置物", "白い食器棚", "ﾃﾞｽｸﾗｲﾄ", "电脑桌", "빨간 책",
)  # fmt: skip


@pytest.mark.parametrize(
    ("query", "found"),
    [
        *(("schrank", 0), ("Stuhl", 1), ("TISCH", 2), ("Tür", 3), ("buerostuhl", 1)),
        *(("Strassenlaterne", 4), ("MÜLL", 5), (unicodedata.normalize("NFD", "Tür"), 3)),
        *(("ソファ", 6), ("赤いソファ", 6), ("机", 7), ("木の机", 7), ("ガラス", 8), ("カラス", 9)),
        *(("棚", 10), ("デスクライト", 11), ("ﾃﾞｽｸ", 11), ("桌", 12), ("책", 13)),
    ],
)
def test_a_word_or_a_part_of_one_finds_its_title(query, found):
    scores = Words(FOREIGN).scores(query)
    assert int(scores.argmax()) == found
    assert scores[found] > 0
    others = [unicodedata.normalize("NFD", one) for one in FOREIGN]  # as a Mac writes file names
    assert Words(others).scores(query).tolist() == scores.tolist()


DOCUMENTS = ("blue shirt", "red shirt", "green shirt", "red hat", "shirt")


def test_a_word_of_the_query_counts_by_its_rarity_and_nothing_is_sure_without_words():
    words = Words(DOCUMENTS)
    scores = words.scores("red hat shirt")
    assert best(scores, 2).tolist() == [3, 1]
    assert scores[3] < 1
    assert words.scores("hat")[3] == pytest.approx(words.scores("red hat")[3])
    assert words.scores("shirt")[4] == 1
    assert best(words.scores("shirts"), 1).tolist() == [4], "a shirt, and nothing else"
    for query in ("red hat shirt", "shirts", "hat", "bluee"):
        alone = [words.score_of(query, text) for text in DOCUMENTS]
        assert alone == pytest.approx(words.scores(query).tolist()), query
    assert words.score_of("hat", "nothing known") == 0
    many = " ".join(f"word{number}" for number in range(64))
    assert not words.scores(f"{many} hat").any(), "words beyond the 64th are not looked at"
    with pytest.raises(ValueError, match="empty vocabulary"):
        Words(["!", "?"])


def test_titles_without_a_text_are_neither_near_nor_far():
    titles = Titles([("a", "b"), (), ("b",), ("c", "a")], [1] * 4)
    assert titles.texts == ["a", "b", "c"]
    found = titles.per_sample(np.array([[1.0, 5.0, 3.0]], np.float32))
    assert found.tolist() == [[5, pytest.approx(13 / 3), 5, 3]]


def test_a_weak_word_does_not_outweigh_the_images():
    """Standardised, a single hit in a thousand titles would be 31 deviations above the mean."""
    images = np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32)
    images[0, 5] = 8
    words = np.zeros((1, 1000), np.float32)
    words[0, 7] = 0.5
    scores = fuse(standardise({"images": images, "words": words}), {"images": 1, "words": 1})
    assert best(scores[0], 1).tolist() == [5]


def test_weights_follow_what_finds_the_titles_and_stay_above_zero():
    titles = [(f"a thing {number}",) for number in range(300)]
    generator = np.random.default_rng(0)
    asked: list[str] = []

    def scores_of(texts: list[str], _: list[tuple[list[int], str]]) -> dict[str, np.ndarray]:
        """Images know most things by their number; titles are noise."""
        noise = generator.normal(size=(2, len(texts), 300)).astype(np.float32)
        numbers = [int("0" + "".join(filter(str.isdigit, text))) for text in texts]
        for row, number in enumerate(numbers):
            noise[0, row, number % 300] += 3
        asked.extend(texts)
        return {"images": noise[0], "titles": noise[1]}

    found = measure(titles, [1] * 300, scores_of)
    assert found["queries"] == len(asked) == 200
    assert found["weights"] == {"images": 9, "titles": 1}
    reached = found["mean_reciprocal_rank"]
    assert reached["all"] > reached["titles"]
    assert set(reached) == {"all", "images", "titles"}
    captioned = [(*own, "one of its other sides") for own in titles[:150] * 2]

    def without(texts: list[str], left_out: list[tuple[list[int], str]]) -> dict[str, np.ndarray]:
        assert [[captioned[n][0] for n in own] for own, _ in left_out] == [[t, t] for t in texts]
        assert [title for _, title in left_out] == texts
        return scores_of(texts, left_out)

    assert measure(captioned, [2] * 300, without)["weights"] == {"images": 9, "titles": 1}
    sizes = [(*own, f"{own[0]}s") for own in titles]

    def by_halves(texts: list[str], left_out: list[tuple[list[int], str]]) -> dict[str, np.ndarray]:
        assert all(samples == [] for samples, _ in left_out)
        assert not set(texts) & {own[0] for own in titles}
        return scores_of(texts, left_out)

    measure(sizes, [2] * 300, by_halves)
    assert typed("a", generator) == "a"
    assert len(typed("one two three four", generator).split()) == 2


@pytest.mark.dali
def test_weights_are_measured_by_images_that_no_signal_knows_by_heart(model, data, tmp_path):
    """Features are noise, by which training captions are found, and no others."""
    generator = np.random.default_rng(0)
    vocabulary = [f"{a}{b}{c}" for a in "bdfkm" for b in "aeiou" for c in "lnrst"]
    titles = [tuple(map(" ".join, generator.choice(vocabulary, (2, 4)))) for _ in range(240)]
    titles[239] = titles[238]  # two photographs of a product
    features = generator.normal(size=(240, 200)).astype(np.float32)
    learnt = PredictedWords(features[:180], titles[:180])
    with PackedDataset(data / "labels") as dataset:
        index = SearchIndex(
            model, dataset, features[:, : model.encoders.config.model.embed_dim],
            titles=Titles(titles, [2] * 240), words=Words(list(map("\n".join, titles))),
            predicted=(learnt, learnt.of_images(features)),
        )  # fmt: skip
        index.weigh(tmp_path / "few.json", np.arange(191, 240))
        assert set(index.report["weights"].values()) == {1}
        for first, low, high in ((0, 0.6, 1.0), (180, 0.0, 0.2)):
            index.weigh(tmp_path / f"{low}.json", np.arange(first, 240))
            assert low < index.report["mean_reciprocal_rank"]["predicted"] < high
        own = index.scores(titles[238][:1], ["words"], [([238, 239], titles[238][0])])["words"][0]
        assert own[238:].max() < 0.5


@pytest.mark.dali
def test_products_are_added_and_removed_without_encoding_the_others(
    model, data, tmp_path, monkeypatch
):
    """Both data sets have the same photographs of cats and frogs, in another order."""
    encoded = {"images": 0, "texts": 0}

    def count(kind: str, room: ModuleType, name: str) -> None:
        encode = getattr(room, name)

        def counting(model: Any, rows: Any, **options: Any) -> Any:
            encoded[kind] += len(rows)
            return encode(model, rows, **options)

        monkeypatch.setattr(room, name, counting)

    count("images", features, "encode_images")
    count("texts", search, "encode_token_rows")
    part = tmp_path / "part"
    for number, path in enumerate(sorted((data / "classes").rglob("*.jpg"))):
        if number % 3:
            copy = part / path.relative_to(data / "classes")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    folder = tmp_path / "kept"
    with open_index(model, part, folder=folder) as index:
        num_part = len(index)
        assert encoded["images"] == num_part
    with open_index(model, data / "classes", folder=folder) as index:
        rows, num_all = np.array(index.images.rows), len(index)
        assert encoded["images"] == num_all > num_part
        assert encoded["texts"] == len(index.titles.texts)
        frogs = index.by_texts(["frogs"], top=2)[0]
        assert [one.labels for one in frogs] == [("frog",), ("frog",)]
        assert index.report["weights"].keys() == {"images", "titles", "words"}
    with open_index(model, data / "classes") as alone:
        np.testing.assert_allclose(rows, alone.images.rows, atol=1e-6)


@pytest.mark.dali
def test_a_search_says_what_it_lacks(model, data, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with open_index(model, data / "captions") as index:
        assert index.signals == ["images", "titles"]
        assert "words are not searched without scikit-learn: pip install" in caplog.text
        for by, said in ((["words"], "of which"), ([], "of which")):
            with pytest.raises(ValueError, match=said):
                index.by_texts(["a"], by=by)
        with pytest.raises(ValueError, match="must be a list"):
            index.by_texts("a dog")
    without = Model(build_model(objective_config("none")))
    with PackedDataset(data / "labels") as dataset:
        rows = np.ones((len(dataset), 4), np.float32)
        index = SearchIndex(without, dataset, rows)
        with pytest.raises(ValueError, match="no text encoder"):
            index.by_texts(["a"])


@pytest.mark.usefixtures("unchecked_shapes")
def test_cells_find_nearly_all_of_many_rows_and_say_how_many(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="pip install --no-deps faiss-cpu")
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(50, 16))
    rows = centres[generator.integers(50, size=4000)] + generator.normal(size=(4000, 16)) / 2
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    queries = rows[:60] + 0.01
    few = Rows(rows)
    few.approximate(tmp_path / "cells", queries)
    assert (few.recall, list(tmp_path.iterdir())) == (1, [])
    monkeypatch.setattr(nearest, "EXACT_BYTES", 1000)
    monkeypatch.setattr(nearest, "_CANDIDATES", 300)
    for _ in range(2):  # made, and found again
        many = Rows(rows)
        many.approximate(tmp_path / "cells", queries)
        assert 0.95 <= many.recall <= 1
        exact, found = few.similarities(queries), many.similarities(queries)
        shared = [set(best(a, 100)) & set(best(b, 100)) for a, b in zip(exact, found, strict=True)]
        assert sum(map(len, shared)) / 6000 == pytest.approx(many.recall, abs=0.02)
        np.testing.assert_allclose(found.max(axis=1), exact.max(axis=1), atol=2e-3)
        monkeypatch.setattr(nearest, "_make_cells", None)
