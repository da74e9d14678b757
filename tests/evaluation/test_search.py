"""Search by texts and images: exact, bounded in memory, and encoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import objective_config, tiny_config

from unicl_fast import Model
from unicl_fast.checkpoints.load import build_model
from unicl_fast.evaluation import features
from unicl_fast.evaluation.search import nearest_rows, open_index


class Rows(np.ndarray):
    """Remembers the most rows that were read at once."""

    most = 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = np.asarray(self)[rows]
        self.most = max(self.most, len(found))
        return found


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("top", [1, 7, 500])
def test_blocks_find_what_a_sort_finds(top: int) -> None:
    generator = np.random.default_rng(0)
    queries, rows = (generator.normal(size=(n, 6)).astype(np.float32) for n in (3, 200))
    rows[150] = rows[20]  # the first of equal ones comes first
    queries[0] = rows[20]
    kept = rows.view(Rows)
    values, places = nearest_rows(queries, kept, top=top, block_bytes=4 * 6 * 30)
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
def test_images_are_encoded_once_and_found_by_texts_and_images(
    model: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_index(model, data / "captions", folder=tmp_path) as index:
        (first, second) = index.by_texts(["two dogs", "a red car"], top=3)
        files = [tmp_path / "query", tmp_path / "other"]
        for number, file in enumerate(files):
            file.write_bytes(index.image_file(number))
        expected = model.embed_images([tmp_path / "query"]) @ model.embed_texts(["two dogs"]).T
        scores = {one.sample: one.score for one in index.by_texts(["two dogs"], top=99)[0]}
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
    (stored,) = tmp_path.glob("*.npy")
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    without = Model(build_model(objective_config("ce")).double())
    for one, said in ((model, "are damaged"), (without, "no projection")):
        with pytest.raises(ValueError, match=said):
            open_index(one, data / "captions", folder=tmp_path).__enter__()
    with open_index(model, data / "classes") as index:  # kept nowhere
        assert index.by_texts(["a cat"], top=1)[0][0].labels
