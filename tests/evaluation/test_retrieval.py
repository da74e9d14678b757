"""Caption retrieval against a sort, and the captions that its figures show."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from pack_runs import jpeg
from packed_sets import Sample, pack
from small_runs import tiny_config
from torch.nn import functional as F

from unicl_fast.checkpoints.load import build_model
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.features import ModelOnRanks, encode_token_rows
from unicl_fast.evaluation.retrieval import (
    RetrievalFeatures,
    encode_captioned,
    held_out_loss,
    own_images,
    rank_captions,
)
from unicl_fast.objectives.loss import reference_loss
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools.evaluate import figures as drawing


def test_all_captions_of_an_image_and_their_like_are_green_and_no_other(monkeypatch, tmp_path):
    """Another image's caption of the same words is right, as in the recalls."""
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, 0.4], [0.0, 1.0]])
    found = RetrievalFeatures(
        image_features=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        text_features=texts,
        image_of_text=torch.tensor([0, 0, 1, 1]),
        text_ids=torch.tensor([0, 1, 0, 2]),
        samples=np.arange(2),
    )
    words = {0: "a cat", 1: "an animal", 2: "a cat", 3: "a dog"}
    drawn = []
    monkeypatch.setattr(drawing, "_read_captions", lambda *_: words)
    monkeypatch.setattr(drawing, "_show_image", Mock())
    monkeypatch.setattr(drawing, "save_figure", lambda figure, _: drawn.append(figure))
    drawing.draw_captions_found(found, Mock(spec=PackedDataset), tmp_path / "figure.png")
    first, second, *_ = drawn[0].axes
    lines = [(line.get_text(), line.get_color()) for line in (*first.texts, *second.texts)]
    assert lines == [
        ("1. (1.00) a cat", drawing._RIGHT),
        ("2. (0.90) a cat", drawing._RIGHT),
        ("3. (0.80) an animal", drawing._RIGHT),
        ("1. (1.00) a dog", drawing._RIGHT),
        ("2. (0.60) an animal", drawing._WRONG),
        ("3. (0.40) a cat", drawing._RIGHT),
    ]
    own = own_images(torch.tensor([0, 2]), found.image_of_text, found.text_ids, num_images=2)
    assert own.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("chunk", [1024, 7])  # 7 divides neither 30 nor 60
def test_retrieval_counts_as_a_sort_does(monkeypatch, chunk):
    monkeypatch.setattr("unicl_fast.evaluation.retrieval._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(30, 6, generator=generator, dtype=torch.float64), dim=1)
    image_of_text = torch.arange(30).repeat_interleave(2).roll(1)
    texts = F.normalize(
        images[image_of_text] + torch.randn(60, 6, generator=generator, dtype=torch.float64), dim=1
    )
    result = rank_captions(images, texts, image_of_text)
    order = (images @ texts.T).argsort(dim=1, descending=True)
    back = (texts @ images.T).argsort(dim=1, descending=True)
    for place, k in enumerate((1, 5, 10)):
        found = sum(i in image_of_text[order[i, :k]] for i in range(30))
        assert result.image_to_text[place].num_found == found
        found = sum(int(image_of_text[j]) in back[j, :k].tolist() for j in range(60))
        assert result.text_to_image[place].num_found == found
    assert 0 < result.text_to_image[0].num_found < 60
    assert result.text_to_image[0].chance == pytest.approx(1 / 30)
    assert result.image_to_text[1].chance == pytest.approx(1 - math.comb(58, 5) / math.comb(60, 5))


def test_equal_captions_belong_to_all_their_images_and_other_ties_count_against_us():
    """As many different captions as classes: each image finds one, and each caption an image."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(4)
    words = F.normalize(torch.randn(4, 6, generator=generator), dim=1)
    image_of_text, text_ids = torch.arange(40), classes.repeat(10)
    texts = words[text_ids]
    noise = 0.01 * torch.randn(40, 6, generator=generator)
    result = rank_captions(F.normalize(texts + noise, dim=1), texts, image_of_text, text_ids)
    assert (result.num_captions, result.num_texts) == (40, 4)
    assert [recall.rate for recall in (*result.image_to_text, *result.text_to_image)] == [1.0] * 6
    chance = pytest.approx(1 - math.comb(30, 5) / math.comb(40, 5))
    assert result.image_to_text[1].chance == result.text_to_image[1].chance == chance
    apart = rank_captions(F.normalize(texts + noise, dim=1), texts, image_of_text)
    assert apart.image_to_text[0].rate == 0  # ten captions of each tie
    same = torch.ones(20, 4) / 2  # a collapsed model finds nothing
    result = rank_captions(same, same, torch.arange(20))
    assert [one.num_found for one in (*result.image_to_text, *result.text_to_image)] == [0] * 6


@pytest.mark.parametrize(("batch_size", "batches"), [(4, [(0, 4), (4, 8)]), (100, [(0, 10)])])
def test_the_held_out_loss_is_the_mean_of_whole_batches_with_first_captions(batch_size, batches):
    """Two of the ten images have the same first caption; an incomplete batch is left out."""
    generator = torch.Generator().manual_seed(1)
    images, texts = (
        F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1)
        for n in (10, 17)
    )
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9, 9])
    first = [image_of_text.tolist().index(image) for image in range(10)]
    class_ids, text_ids = torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9]), torch.arange(17)
    for rows in (texts, text_ids):
        rows[first[3]] = rows[first[1]]
    settings = {"text_ids": text_ids, "scale": 10.0, "batch_size": batch_size}
    loss = held_out_loss(images, texts, image_of_text, **settings)
    expected = [
        reference_loss(images[a:b], texts[first][a:b], class_ids[a:b], 10.0) for a, b in batches
    ]
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-12)


def test_captions_are_those_of_their_numbers(tmp_path):
    """Numbers count the captions of all images that have one; the second has a label only."""
    captions = [["a dog", "the same dog"], [], ["a cat"], ["a hen", "two hens", "three hens"]]
    samples = [Sample(jpeg(n), captions=c, labels=[0] * (not c)) for n, c in enumerate(captions)]
    found = RetrievalFeatures(
        image_features=torch.eye(3),
        text_features=torch.zeros(6, 3),
        image_of_text=torch.tensor([0, 0, 1, 2, 2, 2]),
        text_ids=torch.arange(6),
        samples=np.array([0, 2, 3]),
    )
    with pack(tmp_path / "set", samples, class_names=("cow",), tokenizer=Tokenizer()) as dataset:
        texts = drawing._read_captions(found, dataset, range(6))
    assert list(texts.values()) == [*captions[0], "a cat", *captions[3]]


def test_captions_are_cut_to_the_model_s_context(tmp_path, monkeypatch):
    config = tiny_config()
    model = build_model(config.changed(model={"context_length": 8})).eval()
    monkeypatch.setattr(ModelOnRanks, "features", lambda self, data: torch.zeros(len(data), 2))
    texts = ["a dog", "a dog on a long leash that pulls", "a dog on a long leash of its owner"]
    sample = Sample(jpeg(0), captions=texts)
    with pack(tmp_path / "set", [sample], class_names=(), tokenizer=Tokenizer()) as dataset:
        found = encode_captioned(ModelOnRanks(model), dataset)
    expected = encode_token_rows(model, Tokenizer(8).encode(texts))
    assert torch.allclose(found.text_features, expected, atol=1e-12)
    assert torch.allclose(expected[1], expected[2], atol=1e-12)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
