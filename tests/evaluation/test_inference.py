"""A trained model for use: the same features as an evaluation's, from whatever is given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import objective_config, tiny_config

from unicl_fast import Model
from unicl_fast.checkpoints.load import build_model
from unicl_fast.images.codec import ImageError

NAMES = ("dog", "cat", "horse")


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "captions" / "flickr8k" / "images").glob("*.jpg"))[:5]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    config = tiny_config()
    return Model(build_model(config.changed(data={"evaluation_resize": 40})).double())


def test_paths_images_and_arrays_give_the_same_features(model, photos):
    opened = [Image.open(photo) for photo in photos]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    of_paths = model.embed_images([str(photos[0]), *photos[1:]], batch_size=2)
    np.testing.assert_array_equal(of_paths, model.embed_images(opened))
    np.testing.assert_array_equal(of_paths, model.embed_images(arrays))
    np.testing.assert_allclose(np.linalg.norm(of_paths, axis=1), 1, rtol=1e-6)
    grey = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
    np.testing.assert_array_equal(model.prepare(grey), model.prepare(np.dstack([grey] * 3)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_prepared_as_torchvision_does(model, photos, interpolation):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    mode = InterpolationMode(interpolation)
    config = model.encoders.config
    other = Model(build_model(config.changed(data={"interpolation": interpolation})))
    for photo in photos:
        resized = transforms.resize(Image.open(photo), [40], interpolation=mode)
        expected = np.asarray(transforms.center_crop(resized, [32, 32]))
        assert abs(other.prepare(photo).astype(int) - expected).max() <= 1


def test_classes_are_ranked_by_probability(model, photos):
    found = model.classify(photos, NAMES)
    images = torch.from_numpy(model.embed_images(photos))
    texts = torch.from_numpy(model.embed_texts([f"a photo of a {name}." for name in NAMES]))
    scale = model.encoders.logit_scale.exp().item()
    expected = (scale * images @ texts.T).softmax(dim=1)
    for answer, row in zip(found, expected.tolist(), strict=True):
        assert list(answer.values()) == sorted(answer.values(), reverse=True)
        assert answer == pytest.approx(dict(zip(NAMES, row, strict=True)), rel=1e-4)
    best = [next(iter(one)) for one in model.classify(photos, NAMES, top=1)]
    assert [next(iter(one)) for one in found] == best


@pytest.mark.usefixtures("unchecked_shapes")
def test_unusable_arguments_are_named(model, photos, tmp_path):
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(photos[0].read_bytes()[:3000])
    for images, kind, said in (
        ([photos[1], cut], ImageError, r"cut\.jpg: .*truncated"),
        ([tmp_path / "nowhere.jpg"], FileNotFoundError, "nowhere"),
        ([np.zeros((4, 4, 3), np.float32)], ImageError, r"uint8 .*, not float32 \[4, 4, 3\]"),
        (str(photos[0]), ValueError, "list of paths"),
    ):
        with pytest.raises(kind, match=said):
            model.embed_images(images)
    with pytest.raises(ValueError, match=r"two or more class names .*\['dog', 'dog'\]"):
        model.classify(photos, ["dog", "dog"])
    with pytest.raises(ValueError, match="exactly one"):
        model.classify(photos, NAMES, templates=["a photo"])
    with pytest.raises(ValueError, match="list of texts"):
        model.embed_texts("a dog")
    without = Model(build_model(objective_config("none")).double())
    assert without.embed_images(photos[:2]).shape == (2, 8)
    with pytest.raises(ValueError, match="no text encoder"):
        without.classify(photos, NAMES)
