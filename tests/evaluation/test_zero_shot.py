"""Zero-shot classification of images whose answers are known."""

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from pack_runs import jpeg
from packed_sets import Sample, pack
from small_runs import tiny_config
from torch.nn import functional as F

from unicl_fast import Tokenizer
from unicl_fast.batch import EvaluationBatch
from unicl_fast.checkpoints.load import build_model
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation import zero_shot
from unicl_fast.evaluation.data import open_data
from unicl_fast.evaluation.features import ModelOnRanks, encode_images, encode_token_rows
from unicl_fast.evaluation.levels import classify_at_levels
from unicl_fast.evaluation.zero_shot import classify, zero_shot_classifier
from unicl_fast.models.unicl import UniCL
from unicl_fast.text.hierarchies import Hierarchy

NAMES = ("dog", "cat", "horse", "a very long class name made of many words", "cow", "pig", "hen")
ALL = {"": range(len(NAMES))}
TEMPLATES = ("a photo of a {}.", "{}", "the {} in an image that somebody took on a rainy day")


@pytest.fixture(scope="module")
def model() -> UniCL:
    return build_model(tiny_config()).double().eval()


class ImageLoader:
    """Two batches, the second one ragged."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for ids in torch.arange(len(self.images)).split(4):
            yield EvaluationBatch(images=self.images[ids], sample_ids=ids)

    def close(self) -> None: ...


def test_the_classifier_is_the_normalised_mean_of_normalised_prompts(model):
    ours = zero_shot_classifier(model, class_names=NAMES, templates=TEMPLATES)
    for name, row in zip(NAMES, ours, strict=True):
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        plain = F.normalize(model.encode_text(Tokenizer()(prompts)).mean(dim=0), dim=0)
        torch.testing.assert_close(row, plain, rtol=1e-10, atol=1e-12)


def test_ranks_share_the_prompts(model, monkeypatch):
    """Of five classes the first two ranks have two each, the third has one and the fourth none."""
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(zero_shot, "gather_rows", lambda rows, _: parts.append(rows) or rows)
    for rank in range(4):
        place = Ranks(rank=rank, world_size=4)
        zero_shot_classifier(model, NAMES[:5], templates=TEMPLATES, ranks=place)
    whole = zero_shot_classifier(model, NAMES[:5], templates=TEMPLATES)
    assert [len(part) for part in parts[:4]] == [2] * 4
    torch.testing.assert_close(torch.cat(parts[:4])[:5], whole, rtol=1e-10, atol=1e-12)


def test_counts_are_those_of_a_plain_argmax(model):
    images = torch.randint(
        0, 256, (10, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    classifier = F.normalize(torch.randn(7, 8, dtype=torch.float64), dim=1)
    ranking = (encode_images(model, images) @ classifier.T).argsort(dim=1, descending=True)
    labels = {sample: [int(ranking[sample, sample % 7])] for sample in range(10)}
    labels[8] = []
    labels[9] = [int(ranking[9, 6]), int(ranking[9, 0])]  # two labels, the second is right
    features = ModelOnRanks(model=model).encode(ImageLoader(images), num_samples=10)
    result = classify(
        features, classifier, labels=list(labels.values()), class_names=NAMES, columns=ALL
    )[""]
    # of samples 0 to 7 the place of the label is 0 1 2 3 4 5 6 0; 8 has none, 9 is right
    assert (result.num_samples, result.num_correct, result.num_correct_top5) == (9, 3, 7)
    assert result.num_without_label == 1
    assert sum(count for _, count, _ in result.per_class) == 9
    assert sum(right for _, _, right in result.per_class) == 3
    values = result.to_json()
    assert values["top1"] == 3 / 9
    assert values["top1_interval_95"][0] < 3 / 9 < values["top1_interval_95"][1]
    assert "top-1" in result.to_table()
    with pytest.raises(ValueError, match="no sample of this data set has a label"):
        classify(features, classifier, labels=[[]] * 10, class_names=NAMES, columns=ALL)
    features[3, 0] = torch.nan
    with pytest.raises(ValueError, match="the model is broken"):
        classify(features, classifier, labels=[[0]] * 10, class_names=NAMES, columns=ALL)


def test_names_in_another_order_than_the_data_s_are_refused(tmp_path):
    samples = [Sample(jpeg(number), labels=(number,)) for number in range(2)]
    given = tmp_path / "names.txt"
    with pack(tmp_path / "set", samples, class_names=("cat", "dog"), tokenizer=Tokenizer()):
        pass
    for names, is_refused in (("Cat\nhound\n", False), ("dog\ncat\n", True)):
        given.write_text(names)
        refused = pytest.raises(ValueError, match="names.txt calls it 'dog', which the data has as")
        with refused if is_refused else contextlib.nullcontext():
            data = open_data(str(tmp_path / "set"), ranks=Ranks(), class_names=str(given))
            with data as opened:
                assert opened.class_names == tuple(names.split("\n")[:2])


def test_texts_are_encoded_in_the_order_given(model):
    texts = ["a b c d e f", "a", "one two three", "a b"]
    ours = encode_token_rows(model, Tokenizer().encode(texts), batch_size=2)
    torch.testing.assert_close(ours, model.encode_text(Tokenizer()(texts)), rtol=1e-9, atol=1e-12)


def test_levels_are_counted_by_their_own_names_and_by_the_classes_below():
    """Features are the similarities with each name, so every answer is known."""
    names = ("beagle", "poodle", "cat", "car", "dog", "mammal")
    hierarchy = Hierarchy(names=names[4:], parents=(4, 4, 5, -1, 5, -1))
    images = [
        ([0], {"beagle": 9, "dog": 8, "mammal": 7}),  # right at all levels
        ([0], {"poodle": 9, "cat": 5, "dog": 1, "mammal": 7}),  # a cat at level 1
        ([0], {"cat": 9, "car": 2, "beagle": 1}),  # a car at level 0, a cat at level 1
        ([0, 2], {"car": 8, "mammal": 9, "cat": 1, "poodle": 2}),  # a poodle at level 2
        ([3], {"car": 9}),  # has no other level
        ([2], {"beagle": 9, "dog": 5, "mammal": 1}),  # a dog at level 1, the last one of cats
        ([], {"beagle": 9}),
    ]
    one_hot = torch.eye(len(names), dtype=torch.float64)
    result = classify_at_levels(
        torch.tensor([[shown.get(name, 0.0) for name in names] for _, shown in images]).double(),
        lambda chosen: one_hot[[names.index(name) for name in chosen]],
        labels=[labels for labels, _ in images],
        numbers=range(4),
        class_names=names[:4],
        hierarchy=hierarchy,
    )
    levels = [dataclasses.astuple(level) for level in result.levels]
    assert levels == [(0, 2, 6, 5, 5), (1, 2, 5, 2, 2), (2, 2, 4, 2, 1)]
    # 1 for the poodle, 2 for the cat (from the beagle), 2 for the car (from the cat), and 2
    assert (result.num_samples, result.num_mistakes, result.sum_of_distances) == (6, 4, 7)
    values = result.to_json()
    assert values["distance_of_mistakes"] == 7 / 4
    assert values["levels"][1]["top1"] == 2 / 5
    assert "1.750 for 4 mistakes, 1.167 over all" in result.to_table()
