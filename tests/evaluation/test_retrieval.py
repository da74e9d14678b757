"""Caption retrieval against a sort."""

from __future__ import annotations

import math
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from pack_runs import jpeg
from packed_sets import Sample, pack
from small_runs import tiny_config
from torch.nn import functional as F

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.data import open_data
from unicl_fast.evaluation.features import ModelOnRanks, encode_token_rows
from unicl_fast.evaluation.retrieval import (
    encode_captioned,
    held_out_loss,
    own_images,
    own_texts,
    rank_captions,
)
from unicl_fast.evaluation.zero_shot import evaluate_zero_shot
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.loss import reference_loss
from unicl_fast.text.tokenizer import Tokenizer


def test_captions_of_the_same_words_are_those_of_all_their_images() -> None:
    image_of_text, text_ids = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 2])
    of_texts = own_texts(torch.tensor([0, 1]), image_of_text, text_ids)
    assert of_texts.tolist() == [[True, True, True, False], [True, False, True, True]]
    own = own_images(torch.tensor([0, 2]), image_of_text, text_ids, num_images=2)
    assert own.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("chunk", [1024, 7])  # 7 divides neither 30 nor 60
def test_retrieval_counts_what_a_sort_counts(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
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


def test_equal_captions_are_captions_of_all_their_images() -> None:
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
    for recalls in (result.image_to_text, result.text_to_image):
        assert recalls[1].chance == pytest.approx(1 - math.comb(30, 5) / math.comb(40, 5))
    apart = rank_captions(F.normalize(texts + noise, dim=1), texts, image_of_text)
    assert apart.image_to_text[0].rate == 0  # ten captions of each tie


def test_a_collapsed_model_finds_nothing() -> None:
    same = torch.ones(20, 4) / 2
    result = rank_captions(same, same, torch.arange(20))
    assert [recall.num_found for recall in result.image_to_text] == [0, 0, 0]
    assert [recall.num_found for recall in result.text_to_image] == [0, 0, 0]


@pytest.mark.parametrize(("batch_size", "batches"), [(4, [(0, 4), (4, 8)]), (100, [(0, 10)])])
def test_the_held_out_loss_is_the_mean_of_whole_batches_with_first_captions(
    batch_size: int, batches: list[tuple[int, int]]
) -> None:
    """Ten images, of which two have the same first caption; what two batches leave is left out."""
    generator = torch.Generator().manual_seed(1)
    images, texts = (
        F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1)
        for n in (10, 17)
    )
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9, 9])
    first = [image_of_text.tolist().index(image) for image in range(10)]
    class_ids = torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9])
    texts[first[3]] = texts[first[1]]
    text_ids = torch.arange(17)
    text_ids[first[3]] = text_ids[first[1]]
    loss = held_out_loss(
        images, texts, image_of_text, text_ids=text_ids, scale=10.0, batch_size=batch_size
    )
    expected = [
        reference_loss(images[a:b], texts[first][a:b], class_ids[a:b], 10.0) for a, b in batches
    ]
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-12)


def test_captions_are_cut_to_what_the_model_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    model = build_model(config.changed(model={"context_length": 8})).eval()
    monkeypatch.setattr(ModelOnRanks, "features", lambda self, data: torch.zeros(len(data), 2))
    texts = ["a dog", "a dog on a long leash that pulls", "a dog on a long leash of its owner"]
    sample = Sample(jpeg(0), captions=texts)
    with pack(tmp_path / "set", [sample], class_names=(), tokenizer=Tokenizer()) as dataset:
        found = encode_captioned(ModelOnRanks(model), dataset)
    assert found is not None
    expected = encode_token_rows(model, Tokenizer(8).encode(texts))
    assert torch.allclose(found.text_features, expected, atol=1e-12)
    assert torch.allclose(expected[1], expected[2], atol=1e-12)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_messages_name_what_was_given_not_the_folder_it_is_packed_into(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "one.jpg").write_bytes(jpeg(0))
    (tmp_path / "list.jsonl").write_text('{"image": "photos/cat/one.jpg", "caption": "a cat"}\n')
    on_ranks = ModelOnRanks(Mock(spec=UniCL, text_encoder=object(), config=TrainConfig()))
    with (
        open_data(str(tmp_path / "photos"), ranks=Ranks()) as data,
        pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/photos has no captions"),
    ):
        encode_captioned(on_ranks, data.dataset)
    with (
        open_data(str(tmp_path / "list.jsonl"), ranks=Ranks()) as data,
        pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/list.jsonl has no classes"),
    ):
        evaluate_zero_shot(on_ranks, data.dataset)
