"""The loaders on real packed data: what a batch holds, and that nothing is lost or doubled."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_copies import CUDA, FakeGpu
from loader_runs import (
    BATCH,
    assert_equal,
    assert_joined,
    assert_same,
    batches_of,
    config_of,
    prompts_of,
    texts_of,
)
from packed_sets import Sample, pack
from PIL import Image

from unicl_fast.batch import Batch
from unicl_fast.config import DataConfig, ModelConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.codec import encode_jpeg
from unicl_fast.images.encoded_images import EncodedImages
from unicl_fast.objectives.registry import make_objective
from unicl_fast.pipelines import evaluation_loader, trial
from unicl_fast.pipelines.evaluation_loader import EvaluationLoader
from unicl_fast.pipelines.kernels.jpeg_windows import cut_to_windows
from unicl_fast.pipelines.running import Pace, choose_pace
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.pipelines.trial import try_decoder
from unicl_fast.text.class_lists import fill_template
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.data import build_prompts
from unicl_fast.training.stages import StagedLoader

pytestmark = pytest.mark.dali

LEVELS_APART = 3
"""Limit of `levels_apart` for a GPU's decoder and resize. On the CPU DALI's resize is 0.3 off ours;
mirrored images are 8 levels away and other images 37, or more."""


def make_config(*, context_length: int = 77, positives: str = "text", **data: Any) -> TrainConfig:
    return dataclasses.replace(
        config_of(**data),
        objective=make_objective(positives=positives),
        model=ModelConfig(context_length=context_length),
    )


@pytest.fixture
def datasets(labelled: PackedDataset, captioned: PackedDataset) -> list[PackedDataset]:
    return [labelled, captioned]


def take(datasets: Any, prompts: ClassPrompts, **options: Any) -> list[Batch]:
    return batches_of(datasets, prompts, **({"config": make_config()} | options))


@pytest.mark.parametrize(
    ("settings", "num_images", "window_bytes", "threads", "ahead"),
    [
        ({}, 32, 0, (3, 2), 4),
        ({}, 64, 0, (3, 2), 2),  # more than 5 MB of crops
        ({"threads": 1}, 32, 0, (1,), 4),
        ({"threads": 0}, 32, 0, (6, 6), 4),  # as many as there are cores
        ({"decode_device": "gpu"}, 32, 0, (5,), 4),
        ({}, 10, 1e8, (5,), 1),  # 1 GB of windows
        ({}, 9, 1e8, (3, 2), 4),
    ],
)
def test_graphs_share_the_threads_and_large_batches_are_decoded_one_at_a_time(
    settings, num_images, window_bytes, threads,
    ahead, monkeypatch,
):  # fmt: skip
    monkeypatch.setattr("unicl_fast.pipelines.running.usable_cores", lambda: 12)
    data = DataConfig(**{"threads": 5} | settings)
    device = torch.device("cuda" if data.decode_device == "gpu" else "cpu")
    pace = choose_pace(data, device, num_images=num_images, window_bytes=window_bytes)
    assert pace == Pace(threads=threads, ahead=ahead)


def test_the_size_of_windows_is_that_of_the_largest_images(datasets, prompts, monkeypatch):
    data = make_config(crop_scale=(0.5, 1.0)).data
    shown = np.mean([int(row["height"]) * int(row["width"]) for row in datasets[0].samples])
    # evaluations decode whole images
    whole = int(1e9 / (3 * shown)) + 1
    for batch_size, ahead in ((whole, 1), (whole - 1, 4)):
        assert EvaluationLoader(datasets[0], data, batch_size=batch_size).pace.ahead == ahead
    few_pixels = dataclasses.replace(data, max_pixels=1000)  # none is decoded
    assert EvaluationLoader(datasets[0], few_pixels, batch_size=whole).pace.ahead == 4
    monkeypatch.setattr(evaluation_loader, "_MOST_DECODED", 3 * 3 * shown)
    assert len(EvaluationLoader(datasets[0], data, batch_size=8)) == -(-len(datasets[0]) // 2)


def test_a_batch_keeps_its_contract(datasets, prompts):
    for step, batch in enumerate(take(datasets, prompts, count=4)):
        assert batch.step == step
        assert batch.images.dtype == torch.uint8
        assert tuple(batch.images.shape) == (BATCH, 32, 32, 3)
        u = len(batch.texts.tokens)
        assert tuple(batch.texts.tokens.shape) == (u, 77)
        assert len(torch.unique(batch.texts.tokens, dim=0)) == u
        assert batch.texts.lengths.tolist() == (batch.texts.tokens.argmax(dim=1) + 1).tolist()
        assert int(batch.texts.counts.sum()) == BATCH
        assert torch.equal(batch.texts.counts, torch.bincount(batch.texts.index, minlength=u))
        assert torch.equal(batch.targets.class_ids, batch.targets.text_class_ids[batch.texts.index])
        assert batch.global_index.tolist() == list(range(BATCH))
        texts, targets = batch.texts, batch.targets
        of_targets = targets.class_ids, targets.text_class_ids
        for tensor in (texts.tokens, texts.index, texts.counts, *of_targets):
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()


def test_a_run_in_stages_feeds_what_each_says_and_resumes_in_any(datasets, prompts):
    """Two steps of 18 small images with short texts, one of crops, and then as the run says."""
    config = make_config()
    stages = ("36:image_size=16,global_batch_size=18,context_length=6", "12:crop_scale=1..1")
    run = dataclasses.replace(config.run, samples=84, stages=stages)
    config = dataclasses.replace(config, run=run)

    def batches_from(step: int, *, rank: int = 0, world_size: int = 1) -> list[Batch]:
        loaders = [
            TrainLoader(
                stage, datasets, None, build_prompts(datasets, stage), rank=rank,
                world_size=world_size, spans=run.spans, stage=number,
            )
            for number, stage in enumerate(config.settings_of_stages)
        ]  # fmt: skip
        loader = StagedLoader(loaders, run.spans)
        found = list(itertools.islice(loader.batches(step), 6 - step))
        loader.close()
        return found

    whole = batches_from(0)
    assert [batch.step for batch in whole] == list(range(6))
    assert [len(batch.images) for batch in whole] == [18, 18, 12, 12, 12, 12]
    assert [batch.images.shape[1] for batch in whole] == [16, 16, 32, 32, 32, 32]
    assert [batch.texts.tokens.shape[1] for batch in whole] == [6, 6, 77, 77, 77, 77]
    for step in (1, 2):
        for one, other in zip(batches_from(step), whole[step:], strict=True):
            assert_equal(one, other)
    halves = [batches_from(1, rank=rank, world_size=2) for rank in (0, 1)]
    for one, left, right in zip(whole[1:], *halves, strict=True):
        assert torch.equal(one.images, torch.cat([left.images, right.images]))
    # samples and texts in the order of a run of one stage
    plain = take(datasets, prompts, count=7)
    for name in ("sample_ids", "source_ids"):
        shown, expected = (torch.cat([getattr(b, name) for b in run]) for run in (whole, plain))
        assert torch.equal(shown, expected)
    with pytest.raises(ValueError, match="a TrainLoader is of one stage"):
        TrainLoader(config, datasets, None, prompts)


def test_each_image_comes_with_a_text_of_its_own_sample(datasets, prompts, tokenizer):
    labelled, captioned = datasets
    manifest, kinds = labelled.manifest, Counter()
    for batch in take(datasets, prompts, count=8):
        rows = batch.texts.tokens[batch.texts.index].numpy()
        for i in range(BATCH):
            sample, source = int(batch.sample_ids[i]), int(batch.source_ids[i])
            row, class_id = rows[i], int(batch.targets.class_ids[i])
            kinds[source] += 1
            if source == 0:
                label = int(labelled.labels_of(sample)[0])
                name = manifest.class_names[label]
                allowed = [fill_template(t, name) for t in manifest.templates]
                assert class_id == prompts.classes_of(0, label)
                assert (tokenizer(allowed).numpy() == row).all(axis=1).any()
            else:
                count = int(captioned.samples[sample]["captions_count"])
                allowed_rows = [captioned.caption_tokens(sample, k) for k in range(count)]
                assert any(np.array_equal(r, row[: len(r)]) for r in allowed_rows)
                assert class_id >= 2**62
    assert min(kinds.values()) > 30


def test_images_belong_to_their_samples(labelled, prompts):
    """Whole images (no crop, no flip), compared by their mean colour."""
    config = make_config(crop_scale=(1.0, 1.0), crop_ratio=(0.1, 10.0), flip_probability=0.0)
    images = EvaluationLoader(labelled, config.data, batch_size=len(labelled))
    reference = next(iter(images)).images.float()
    for batch in take([labelled], prompts, count=3, config=config):
        colours = batch.images.float().mean(dim=(1, 2))
        distance = torch.cdist(colours, reference.mean(dim=(1, 2)))
        own = distance.gather(1, batch.sample_ids[:, None])
        assert (distance < own).float().mean() < 0.15


@pytest.fixture
def several(shared_data: Path, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[PackedDataset]:
    """24 photographs of COCO with their captions and all their categories; some have none."""
    folder = shared_data / "captions" / "coco"
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    rows = [json.loads(line) for line in lines]
    names = sorted({name for row in rows for name in row["labels"]})
    labels = [[names.index(name) for name in row["labels"]] for row in rows]
    samples = [
        Sample((folder / row["image"]).read_bytes(), captions=row["captions"], labels=of_row)
        for row, of_row in zip(rows, labels, strict=True)
    ]
    with pack(tmp_path / "coco", samples, class_names=names, tokenizer=tokenizer) as dataset:
        yield dataset


def test_images_have_the_classes_of_all_their_labels_whatever_their_text(
    several, captioned, tokenizer
):
    """From any step, and on any rank; texts are those of a run that takes one label alone."""
    datasets = [captioned, several]
    prompts = prompts_of(datasets, tokenizer)
    config = make_config(positives="labels")
    batches = take(datasets, prompts, count=4, config=config)
    most, num_captions = 0, 0
    for batch, of_one_label in zip(batches, take(datasets, prompts, count=4), strict=True):
        plain_targets = dataclasses.replace(batch.targets, image_classes=None)
        assert_equal(dataclasses.replace(batch, targets=plain_targets), of_one_label)
        samples, classes = batch.targets.image_classes
        for i in range(BATCH):
            expected = {int(batch.targets.class_ids[i])}
            if batch.source_ids[i] == 1:
                labels = several.labels_of(int(batch.sample_ids[i]))
                expected |= set(prompts.classes_of(1, labels).tolist())
                num_captions += int(batch.targets.class_ids[i]) >= 2**62 and len(labels) > 1
            found = classes[samples == i].tolist()
            assert len(found) == len(expected)
            assert set(found) == expected
            most = max(most, len(found))
    assert most > 3
    assert num_captions > 0
    (later,) = take(datasets, prompts, start=3, count=1, config=config)
    assert_equal(later, batches[3])
    for rank in range(2):
        (part,) = take(datasets, prompts, start=1, count=1, rank=rank, world_size=2, config=config)
        samples, classes = batches[1].targets.image_classes
        mine = (samples >= 6 * rank) & (samples < 6 * rank + 6)
        assert torch.equal(
            part.targets.image_classes, torch.stack([samples[mine] - 6 * rank, classes[mine]])
        )


AUGMENTED = ("unicl,grayscale=0.2", "captioned:none,policy=rand,erase=0.5")


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ({}, 2),
        ({"augment": AUGMENTED, "interpolation": "bicubic"}, 3),
    ],
)  # fmt: skip
def test_batches_are_the_same_from_any_step_and_over_any_ranks(
    datasets, prompts, settings, world_size
):
    options: dict[str, Any] = {"config": make_config(**settings), "weights": [1.0, 2.0]}
    whole = take(datasets, prompts, start=6, count=3, **options)
    assert_same(whole[1:], take(datasets, prompts, start=7, count=2, **options))
    ranks = [
        take(datasets, prompts, start=7, count=2, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    for expected, *parts in zip(whole[1:], *ranks, strict=True):
        assert_joined(parts, expected)
        assert torch.bincount(expected.source_ids).tolist() == [4, 8]


def test_files_cut_to_their_windows_give_the_same_batches(
    shared_data, tokenizer, prompts, tmp_path, monkeypatch
):
    files = sorted((shared_data / "decode" / "images").glob("*.JPEG"))[:BATCH]
    images = [np.asarray(Image.open(one).convert("RGB").resize((224, 168))) for one in files]
    encoded = [encode_jpeg(pixels, quality=90, subsampling="420") for pixels in images]
    samples = [Sample(one, captions=["a"]) for one in encoded]
    lengths = {True: 0, False: 0}  # of the files that the graphs get

    def cut(images: EncodedImages, *windows: Any) -> tuple[list[Any], Any]:
        shorter, starts = cut_to_windows(images, *windows)
        lengths[True] += sum(map(len, shorter))
        lengths[False] += int(images.sizes.sum())
        return shorter, starts

    config = make_config(augment=("unicl",))
    with pack(tmp_path / "set", samples, class_names=(), tokenizer=tokenizer) as dataset:
        monkeypatch.setattr("unicl_fast.pipelines.host_batches.cut_to_windows", cut)
        shorter = take([dataset], prompts, count=2, config=config)
        monkeypatch.setattr(
            "unicl_fast.pipelines.host_batches.cut_to_windows",
            lambda images, starts, _: (images.files(), starts),
        )
        whole = take([dataset], prompts, count=2, config=config)
    assert 0 < lengths[True] < 0.8 * lengths[False]
    for one, other in zip(shorter, whole, strict=True):
        assert_equal(one, other)


def test_a_state_continues_a_loader_on_any_number_of_ranks(datasets, prompts):
    whole = take(datasets, prompts, count=5)
    config = make_config().changed(run={"steps": 5})
    one = TrainLoader(config, datasets, None, prompts)
    assert len(one) == 5
    assert_same([batch.to(torch.device("cpu")) for batch in itertools.islice(one, 3)], whole[:3])
    state = json.loads(json.dumps(one.state_dict()))
    one.close()
    parts = []
    for rank in range(2):
        loader = TrainLoader(config, datasets, None, prompts, rank=rank, world_size=2)
        loader.load_state_dict(state)
        parts.append(list(loader))  # the rest of the run, and no more
        assert loader.state_dict()["next_step"] == 5
        assert not list(loader)
        loader.close()
    for pair, expected in zip(zip(*parts, strict=True), whole[3:], strict=True):
        assert_joined(pair, expected)
    other = TrainLoader(config.changed(run={"seed": 4}), datasets, None, prompts)
    with pytest.raises(ValueError, match="a loader with seed = 3, this one has 4: resume with"):
        other.load_state_dict(state)
    endless = TrainLoader(make_config(), datasets, None, prompts)
    with pytest.raises(TypeError, match=r"run\.steps or run\.samples"):
        len(endless)


def test_prompts_with_an_exclamation_mark_keep_their_end(labelled, tokenizer):
    """The id of "!" is 0, like padding."""
    names = [f"yahoo!(tm) {number}!" for number in range(len(labelled.manifest.class_names))]
    template = "a photo of {}"
    (batch,) = take([labelled], ClassPrompts([(names, [template])], tokenizer), count=1)
    rows = tokenizer([fill_template(template, name) for name in names]).tolist()
    assert any(0 in row[: row.index(tokenizer.end_id)] for row in rows)
    assert all(row in rows for row in batch.texts.tokens.tolist())
    assert batch.texts.lengths.tolist() == (batch.texts.tokens.argmax(dim=1) + 1).tolist()


def test_a_shorter_context_cuts_captions_and_keeps_their_end(captioned, tokenizer):
    prompts = ClassPrompts([((), ())], tokenizer)
    (long,) = take([captioned], prompts, count=1)
    (short,) = take([captioned], prompts, count=1, config=make_config(context_length=8))
    rows, cut = texts_of(long)[:, :-1], texts_of(short)[:, :-1]
    assert short.texts.lengths.max() == 8
    assert tuple(cut.shape) == (BATCH, 8)
    assert torch.equal(cut[:, :7], rows[:, :7])
    assert (cut[:, 7] == tokenizer.end_id).all()


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1000), (2, 7), (3, 6)])
def test_evaluation_shows_each_sample_once_over_all_ranks_and_epochs(
    captioned, world_size, batch_size
):
    """The same images whatever the ranks and batches; some ranks have none."""
    data = make_config().data
    (whole,) = EvaluationLoader(captioned, data, batch_size=100)
    loaders = [
        EvaluationLoader(captioned, data, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(2):
        seen: list[int] = []
        for loader in loaders:
            batches = list(loader)
            assert len(batches) == len(loader)
            for batch in batches:
                assert torch.equal(batch.images, whole.images[batch.sample_ids])
                seen += batch.sample_ids.tolist()
        assert sorted(seen) == list(range(len(captioned)))
    none = EvaluationLoader(captioned, data, batch_size=batch_size, rank=70, world_size=80)
    assert len(none) == len(list(none)) == 0


@pytest.mark.parametrize("decode_device", ["cpu", "auto"])
def test_the_cpu_decodes_for_a_gpu_what_it_decodes_alone(
    monkeypatch, datasets, prompts, decode_device
):
    expected = take(datasets, prompts, count=3)
    (evaluated,) = EvaluationLoader(datasets[1], make_config().data, batch_size=100)
    gpu = FakeGpu(monkeypatch)
    config = make_config(decode_device=decode_device)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, threads=4))
    loader = TrainLoader(config, datasets, None, prompts, device=CUDA)
    batches = loader.batches(0)
    for batch in expected:
        copied = next(batches)
        assert_equal(copied, batch)
        assert gpu.used_by[copied.images.data_ptr()] is gpu.compute
    loader.close()
    (shown,) = EvaluationLoader(datasets[1], config.data, batch_size=100, device=CUDA)
    assert torch.equal(shown.images, evaluated.images)
    assert gpu.used_by[shown.images.data_ptr()] is gpu.compute


@pytest.mark.parametrize("here", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_decoder_is_tried_on_images_of_the_data(datasets, monkeypatch, here):
    """With the CPU's, in a child; one that has passed is not tried again."""

    def decode_here(function: Callable[..., None], *arguments: Any) -> str:
        function(*arguments)
        return ""

    if here:
        monkeypatch.setattr(trial, "fault_of_child", decode_here)
    monkeypatch.setattr(trial, "_tried", set())
    data, device = make_config().data, torch.device("cpu")
    try_decoder(datasets, data, device)
    assert (str(device), *(dataset.location for dataset in datasets)) in trial._tried


OTHER_PIXELS = {
    "black": lambda images, before: torch.zeros_like(images),
    "shifted": lambda images, before: images.roll(1, 2),
    "one image torn": lambda images, before: torch.cat([images[:1].roll(9, 1), images[1:]]),
    "of the batch before": lambda images, before: before,
}


@pytest.mark.parametrize("fault", OTHER_PIXELS)
def test_a_decoder_that_gives_other_pixels_than_the_cpu_s_fails_its_trial(
    datasets, monkeypatch, fault
):
    """The second of two decoders is the device's."""
    decodes, begun = trial.decode, itertools.count()

    def faulty(*arguments: Any, **settings: Any) -> Iterator[tuple[torch.Tensor, int]]:
        is_device, before = next(begun) % 2, None
        for images, turn in decodes(*arguments, **settings):
            before = images.clone() if before is None else before
            yield (OTHER_PIXELS[fault](images, before) if is_device else images), turn

    monkeypatch.setattr(trial, "decode", faulty)
    data = make_config().data
    settings = {"image_size": data.image_size, "interpolation": data.interpolation}
    with pytest.raises(ArithmeticError, match="its pixels differ from the CPU's"):
        trial._decode(*trial._first_images(datasets, data), settings, "cpu")


def test_a_gpu_s_decoder_that_fails_its_trial_is_refused(monkeypatch, datasets, prompts):
    monkeypatch.setattr(trial, "fault_of_child", lambda *_: "crashed (SIGSEGV)")
    config = make_config(decode_device="gpu")
    with pytest.raises(ValueError, match=r"crashed \(SIGSEGV\); take data.decode_device=cpu"):
        TrainLoader(config, datasets, None, prompts, device=CUDA)
    with pytest.raises(ValueError, match=r"crashed \(SIGSEGV\); take data.decode_device=cpu"):
        EvaluationLoader(datasets[0], config.data, batch_size=5, device=CUDA)


def levels_apart(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each image, in levels of 255."""
    assert images.shape == others.shape
    return (images.float() - others.float()).abs().mean(dim=(1, 2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("decode_device", ["cpu", "gpu", "auto"])
def test_a_gpu_gets_its_batches_from_either_decoder(datasets, prompts, decode_device):
    """From the CPU the very same; from the GPU, images of another decoder."""
    expected = take(datasets, prompts, count=3)
    config = make_config(decode_device=decode_device)
    loader = TrainLoader(config, datasets, None, prompts, device="cuda")
    for step, batch in enumerate(itertools.islice(loader.batches(0), 3)):
        assert all(value.is_cuda for value in batch.model_inputs().values())
        on_host = batch.to(torch.device("cpu"))
        torch.cuda.synchronize()
        if decode_device == "gpu":
            assert levels_apart(on_host.images, expected[step].images).max() < LEVELS_APART
            on_host = dataclasses.replace(on_host, images=expected[step].images)
        assert_equal(on_host, expected[step])
    loader.close()
