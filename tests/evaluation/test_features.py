"""Features of labelled images: kept only while they would be the same, put together."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pack_runs import jpeg
from packed_sets import Sample, pack
from rank_workers import open_class_folders, ranks_of, run_on_ranks
from small_runs import tiny_config

from unicl_fast import Tokenizer
from unicl_fast.checkpoints.load import build_model
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation import features
from unicl_fast.evaluation.features import collect_rows, keys_of_features, model_on_ranks
from unicl_fast.models.unicl import UniCL
from unicl_fast.training.encoding import in_pieces, loaded_at_once

TOKENIZER = Tokenizer()
SEEN_AS = [
    *({"image_size": 28}, {"evaluation_resize": 36}, {"interpolation": "bicubic"}),
    *({"resample": "dali"}, {"decode_device": "gpu"}),
    *({"mean": (0.5, 0.5, 0.4)}, {"std": (0.2, 0.2, 0.3)}),
]
"""Settings of `data` that change what the encoder sees."""


def packed(out: Path, numbers: Sequence[int], *, caption: str = "one") -> PackedDataset:
    samples = [Sample(jpeg(number), captions=[caption]) for number in numbers]
    return pack(out, samples, class_names=(), tokenizer=TOKENIZER)


def key_of(model: UniCL, dataset: PackedDataset, layer: str = "encoder") -> str:
    return keys_of_features(model, dataset, layer=layer)[1]


@pytest.fixture
def model() -> UniCL:
    return build_model(tiny_config())


def test_a_cpu_decodes_and_encodes_few_images_at_once():
    """332 photographs of 224 pixels are evaluated in 1.2 GB."""
    sides = {32: 32, 128: 24, 224: 8, 2000: 1}
    shapes = {(70, side, side, 3): expected for side, expected in sides.items()}
    for shape, expected in {**shapes, (70, 1280): 32, (0, 32, 32, 3): 0}.items():
        assert len(in_pieces(torch.empty(shape, dtype=torch.uint8))[0]) == expected
        assert len(in_pieces(torch.empty(shape, device="meta"))[0]) == shape[0]
    sizes = [loaded_at_once(size, torch.device("cpu")) for size in (8, 256)]
    assert [*sizes, loaded_at_once(256, torch.device("cuda"))] == [8, 32, 256]


@torch.no_grad()
def test_all_that_decides_features_and_nothing_else_changes_their_key(model, tmp_path):
    """Weights of the image encoder and its projection, settings, images, their order, the layer."""
    with packed(tmp_path / "set", [0, 1]) as dataset:
        keys = {key_of(model, dataset, "projection")}
        assert {key_of(build_model(tiny_config()), dataset, "projection")} == keys
        assert model.text_projection is not None
        model.text_projection += 1
        assert {key_of(model, dataset, "projection")} == keys, (
            "texts do not decide features of images"
        )
        names = [name for name, _ in model.named_parameters() if name.startswith("image_")]
        for count, name in enumerate((names[0], names[-1], "image_projection"), start=2):
            model.get_parameter(name).view(-1)[-1] += 1e-6
            keys.add(key_of(model, dataset, "projection"))
            assert len(keys) == count, name
        config, keys = model.config, {key_of(model, dataset)}
        for count, change in enumerate(SEEN_AS, start=2):
            model.config = config.changed(data={**change})
            keys.add(key_of(model, dataset))
            assert len(keys) == count, change
        model.config = config.changed(efficiency={"precision": "bf16"})
        key = key_of(model, dataset)
        assert key not in keys
        with packed(tmp_path / "renamed", [0, 1], caption="two") as renamed:
            assert key_of(model, renamed) == key
        keys = {key, key_of(model, dataset, layer="projection")}
    for numbers in ([1, 0], [0, 2], [0, 1, 2]):
        with packed(tmp_path / str(numbers), numbers) as other:
            keys.add(key_of(model, other))
    assert len(keys) == 5


@pytest.mark.parametrize("decode_device", ["auto", "gpu"])
def test_the_decoding_device_is_settled_before_a_model_is_evaluated(
    monkeypatch, model, decode_device
):
    """A GPU's run is evaluated on the CPU, too."""
    model.config = model.config.changed(data={"decode_device": decode_device})
    monkeypatch.setattr(features, "load_encoders", lambda *_, **__: model)
    with model_on_ranks("run", device="cpu") as on_ranks:
        assert on_ranks.model.config.data.decode_device == "cpu"


def test_what_a_killed_evaluation_has_encoded_is_not_projected(model, tmp_path, monkeypatch):
    """A linear probe that was killed leaves a file of which a search must not take empty rows."""
    monkeypatch.setattr(features.ModelOnRanks, "loader", lambda self, dataset, samples: samples)
    ours, ends_at = features.ModelOnRanks(model.double().eval()), 2
    images = torch.arange(3, dtype=torch.uint8).mul(80)[:, None, None, None, None]
    images = images.expand(3, 1, 32, 32, 3)

    def encoded(self, samples, *, num_samples, layer):
        for number in samples:
            if number == ends_at:
                raise KeyboardInterrupt
            yield torch.tensor([number]), features.encode_images(model, images[number], layer=layer)

    monkeypatch.setattr(features.ModelOnRanks, "encoded", encoded)
    with packed(tmp_path / "set", [0, 1, 2]) as dataset, torch.inference_mode():
        with pytest.raises(KeyboardInterrupt):
            ours.stored(dataset, tmp_path / "kept", layer="encoder")
        ends_at = None
        _, found = ours.stored(dataset, tmp_path / "kept", layer="projection")
        _, expected = ours.stored(dataset, tmp_path / "whole", layer="projection")
        ours.stored(dataset, tmp_path / "kept", layer="encoder")
        monkeypatch.setattr(features, "kept_rows", lambda *_, encode, **__: next(encode([]))[1])
        _, of_none = ours.stored(dataset, tmp_path / "kept", layer="projection")
    assert len(of_none) == 0, "a rank without new images"
    assert np.array_equal(found, expected)
    assert (np.linalg.norm(found, axis=1) > 0.9).all()


@pytest.mark.parametrize("count", [1, 7])
def test_rows_of_ranks_come_in_turn(monkeypatch, count):
    """Of a single row, two of three ranks have none."""
    table = torch.arange(3.0 * count).view(count, 3)
    parts = {str(rank): table[rank::3] for rank in range(3) if rank < count}
    monkeypatch.setattr(features, "tensors_to_rank_0", lambda *_: parts)
    found = collect_rows(parts["0"], num_rows=count, ranks=Ranks(world_size=3))
    assert torch.equal(found, table)


@pytest.mark.slow
def test_ranks_wait_for_rank_0_to_pack_longer_than_a_collective_may_last(data):
    run_on_ranks(open_class_folders, 2, str(data / "classes"), 10.0, False)


@pytest.mark.slow
def test_ranks_that_wait_for_rank_0_say_that_it_has_ended(data):
    with ranks_of(open_class_folders, 2, str(data / "classes"), 240.0, True) as processes:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [3, 4]
