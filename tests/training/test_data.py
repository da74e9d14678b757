"""Packed data sets are checked against the tokenizer before a model sees their tokens."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from file_tokenizers import write_tokenizer
from pack_runs import jpeg
from packed_sets import Sample, pack, sample_of, write_set
from rank_workers import name_data_by_rank, name_evaluations, run_on_ranks
from small_runs import tiny_config

from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.objectives.registry import make_objective
from unicl_fast.presets import build_preset
from unicl_fast.system.wording import refuse_differences
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training import data as training_data
from unicl_fast.training.build import open_checked
from unicl_fast.training.data import (
    build_prompts,
    check_tokenizer,
    describe_datasets,
    distinct_names,
    log_cut_captions,
    open_datasets,
    warn_of_shared_images,
)
from unicl_fast.training.settle import settle_decoding, settle_objective


@pytest.mark.parametrize("token", [49_405, 49_408])
def test_a_token_beyond_the_vocabulary_is_refused(tmp_path, token):
    tokenizer = Tokenizer()
    tokens = [np.array([49_406, token, 49_407], np.uint16)]
    facts = {"tokenizer": tokenizer.name, "vocabulary_hash": tokenizer.vocabulary_hash}
    one = sample_of(b"image", 1, captions=["x"], tokens=tokens)
    write_set(tmp_path / "set", [one], **facts)
    with PackedDataset(tmp_path / "set") as dataset:
        if token < tokenizer.vocab_size:
            check_tokenizer(dataset, TrainConfig())
        else:
            with pytest.raises(ValueError, match="token 49408 is beyond the vocabulary of 49408"):
                check_tokenizer(dataset, TrainConfig())


def test_texts_that_end_elsewhere_than_the_model_reads_are_refused(tmp_path):
    model = {"tokenizer": str(write_tokenizer(tmp_path)), "vocab_size": 120, "context_length": 16}
    with pytest.raises(ValueError, match="ends texts with a smaller one: take model.text_pool=l"):
        open_checked(tiny_config().changed(model=model))
    with pytest.raises(ValueError, match="nothing to train on"):
        open_checked(tiny_config().changed(model={**model, "text_pool": "last"}))


@pytest.mark.parametrize("context_length", [2, 16, 77])
def test_longer_captions_are_cut_as_the_tokenizer_cuts_them_and_counted(
    tmp_path, context_length, caplog
):
    """That a data set was packed for 77 tokens says nothing about its texts."""
    texts = ["a dog", "word " * 14, "word " * 20, "word " * 200]  # 4, 16, 22 and 77 tokens
    samples = [Sample(jpeg(number), captions=[text]) for number, text in enumerate(texts)]
    caplog.set_level("INFO")
    with pack(tmp_path / "set", samples, class_names=(), tokenizer=Tokenizer()) as dataset:
        log_cut_captions(dataset, context_length)
        expected = {2: "4 of 4 captions", 16: "2 of 4 captions"}.get(context_length)
        cut = f"are cut to model.context_length={context_length} tokens"
        lines = [f"{dataset.location}: {expected} {cut}"] if expected else []
        assert caplog.messages == lines
        for number, row in enumerate(Tokenizer(context_length).encode(texts)):
            found = dataset.caption_tokens(number, 0, context_length=context_length)
            assert found.tolist() == row.tolist()


A_DOG = {"captions": ["a dog"], "labels": [0]}


@pytest.mark.parametrize(
    ("sample", "settings", "options", "positives"),
    [
        (A_DOG, {}, {}, "labels"),
        ({"labels": [0, 1]}, {}, {}, "labels"),
        (A_DOG, {}, {"name": "sigmoid"}, "labels"),
        ({"labels": [0, 1]}, {}, {"name": "ce"}, "labels"),
        ({"captions": ["a dog", "a hound"]}, {}, {}, "text"),
        ({"labels": [0]}, {}, {}, "text"),
        (A_DOG, {"text": "labels"}, {}, "text"),  # its only class is shown
        (A_DOG, {"text": "captions"}, {}, "labels"),
        (A_DOG, {}, {"positives": "text"}, "text"),
    ],
)
def test_all_labels_of_an_image_count_where_one_text_does_not_have_them(
    sample, settings, options, positives,
    tmp_path, caplog,
):  # fmt: skip
    """Otherwise the prompt of its label is wrong for an image that is shown with its title."""
    config = TrainConfig(data=DataConfig(**settings), objective=make_objective(**options))
    samples = [Sample(jpeg(0), **sample), Sample(jpeg(1), labels=[1])]
    caplog.set_level("INFO")
    facts = {"class_names": ("dog", "cat"), "tokenizer": Tokenizer()}
    with pack(tmp_path / "set", samples, **facts) as dataset:
        settled = settle_objective(config, [dataset]).objective
    assert settled.positives == positives
    assert settled.takes_all_labels == (positives == "labels")
    said = [line for line in caplog.messages if "objective.positives: labels, since" in line]
    assert len(said) == settled.takes_all_labels


@pytest.mark.parametrize(("context_length", "are_one"), [(77, False), (6, True)])
def test_classes_that_a_short_context_cannot_tell_apart_are_joined_before_training(
    context_length, are_one
):
    """Otherwise a rank would join them where both are in its local batch, and another would not."""
    config = build_preset("digits-small")
    model = dataclasses.replace(config.model, context_length=context_length)
    names = ["old fishing boat red", "old fishing boat green"]
    dataset: Any = SimpleNamespace(manifest=SimpleNamespace(class_names=names, templates=["a {}"]))
    prompts = build_prompts([dataset], dataclasses.replace(config, model=model))
    one, other = prompts.classes_of(0, np.arange(2))
    assert (one == other) == are_one


@pytest.mark.parametrize(
    ("machines", "settings", "expected"),
    [
        (1, {}, ["all of it is shuffled together", "shuffle_window to 266666 or less"]),
        (1, {"cache_bytes": 300 * 10**9}, []),
        (1, {"shuffle_window": 10**6}, ["two windows of data.shuffle_window"]),
        (8, {"shuffle_window": 10**6}, []),
        (8, {}, ["all of it is shuffled together", "shuffle_window to 2133333 or less"]),
        (8, {"shuffle_window": 250_000, "shuffle_groups": 1}, ["read it 8.0 times", "of 8 in"]),
        (100, {"shuffle_window": 10**6}, ["read it 1.8 times an epoch", "a multiple of 100 in"]),
    ],
)
def test_an_order_that_reads_a_url_too_often_is_warned_of(
    machines, settings, expected,
    monkeypatch, caplog,
):  # fmt: skip
    """Ten million samples of 30 kB, and a cache of 20 GB."""

    class Large:
        cache, location = CacheOptions(), "s3://bucket/large"
        shards = (SimpleNamespace(num_bytes=30_000 * 10**7),)
        manifest = SimpleNamespace(shards=shards, pixels=None, in_place=None, num_samples=10**7)

        def __len__(self) -> int:
            return 10**7

    monkeypatch.setenv("WORLD_SIZE", str(machines * 4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(training_data, "PackedDataset", lambda *_, **__: Large())
    open_datasets(DataConfig(train=(Large.location,), **settings))
    assert len(caplog.messages) == (expected != [])
    for part in expected:
        assert part in caplog.text


def test_each_data_set_is_used_as_far_as_the_config_says(data):
    folders = (str(data / "labels"), str(data / "captions"))
    whole, _ = open_datasets(DataConfig(train=folders))
    halves, shares = open_datasets(DataConfig(train=folders, fraction=(0.5,)))
    parts, _ = open_datasets(DataConfig(train=folders, fraction=(1.0, 0.25)))
    sizes = [len(dataset) for dataset in whole]
    assert [len(dataset) for dataset in halves] == [round(size / 2) for size in sizes]
    assert [len(dataset) for dataset in parts] == [sizes[0], round(sizes[1] / 4)]
    assert shares is None
    with pytest.raises(ValueError, match=r"num_samples was 20 and is now 5"):
        refuse_differences("data", describe_datasets(whole, None), describe_datasets(parts, None))
    for dataset in (*whole, *halves, *parts):
        dataset.close()


@pytest.mark.parametrize(
    ("locations", "names"),
    [
        (["/a/test", "/b/test", "/b/y/"], ["a-test", "b-test", "y"]),
        (["/a/x/test", "/b/x/test", "/test"], ["a-x-test", "b-x-test", "test"]),
        (["/a/test", "/b/test", "/b/a-test"], ["a-test", "b-test", "b-a-test"]),
        (["s3://bucket/a/test", "s3://bucket/b/test/"], ["a-test", "b-test"]),
        (["https://u:pw@a/test", "https://u:pw@b:80/test"], ["a-test", "b:80-test"]),
    ],
)
def test_data_sets_of_one_name_are_told_apart_by_the_folders_above(locations, names):
    assert distinct_names(locations) == names


def test_one_data_set_twice_is_refused_or_numbered(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "labels")
    twice = [str(tmp_path / "labels"), str(tmp_path / "link")]
    with pytest.raises(ValueError, match="link is the same data set as .*labels: name it once"):
        distinct_names(twice)
    assert distinct_names(twice, may_repeat=True) == ["labels", "labels-2"]
    with pytest.raises(ValueError, match="would both be called a-b-c: rename"):
        distinct_names(["s3://a-b/c", "s3://a/b-c", "s3://x/c", "s3://x/b-c"])
    with pytest.raises(ValueError, match=r"^https://a/x is the same data set as https://a/x:"):
        distinct_names(["https://u:pw@a/x", "https://v:pw@a/x"])
    with pytest.raises(ValueError, match=r"^https://a-b/c and https://a/b-c would both be called"):
        distinct_names(["https://u:pw@a-b/c", "https://u:pw@a/b-c", "s3://x/c", "s3://x/b-c"])


def test_other_pixels_or_class_names_are_other_data(tmp_path):
    """A run does not resume with them, though descriptions and shards are the same."""
    described = []
    size = {"extension": "raw", "height": 2, "width": 2, "xxh3": 0}
    for number, (level, name) in enumerate(((1, "dog"), (2, "dog"), (1, "cow"), (1, "dog"))):
        one = sample_of(bytes([level]) * 12, 0, **size)
        out = tmp_path / str(number)
        write_set(out, [one], images="raw", class_names=["cat", name])
        with PackedDataset(out) as dataset:
            described.append(describe_datasets([dataset], None))
    assert [one == described[-1] for one in described] == [True, False, False, True]


@pytest.mark.parametrize(("weights", "warned"), [((0.25, 0.75), False), ((1, 3), True)])
def test_weights_that_do_not_sum_to_1_are_warned_of(data, caplog, weights, warned):
    names = ("labels", "captions")
    train = tuple(f"{data / name}={weight}" for name, weight in zip(names, weights, strict=True))
    open_datasets(DataConfig(train=train))
    assert ("weights sum to 4, not 1" in caplog.text) == warned
    assert ("labels 25.0%" in caplog.text) == warned


def test_images_that_are_trained_on_and_evaluated_are_warned_of(tmp_path, caplog):
    for name, numbers in {"train": range(9), "held-out": range(7, 12)}.items():
        write_set(tmp_path / name, [sample_of(b"image %d" % number, 0) for number in numbers])
    train, held_out = (PackedDataset(tmp_path / name) for name in ("train", "held-out"))
    warn_of_shared_images([train], [held_out])
    assert f"2 of the 5 images of {tmp_path}/held-out are in {tmp_path}/train too" in caplog.text
    assert "unicl-pack build SOURCE... --split 0.9" in caplog.text


def test_a_rank_decodes_on_its_own_cores_unless_told_how_many():
    for given, expected in ((0, 14), (3, 3)):
        config = TrainConfig(data=DataConfig(threads=given))
        settled = settle_decoding(config, torch.device("cpu"), Ranks(cores=14))
        assert settled.data.threads == expected


def test_data_may_lie_elsewhere_on_another_node(images):
    run_on_ranks(name_data_by_rank, 2, images)


def test_evaluations_are_named_by_rank_0(tmp_path):
    links = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
        links.append(str(tmp_path / f"link-{name}"))
    run_on_ranks(name_evaluations, 2, links)
