"""Exports load in transformers, open_clip and timm without this package."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import model_with_weights_that_matter, small_config

from unicl_fast import UniCL, build_model, load_model
from unicl_fast.conversion.export import write_export
from unicl_fast.conversion.hugging_face import layout_of
from unicl_fast.conversion.libraries import write_timm
from unicl_fast.conversion.open_clip import write_open_clip
from unicl_fast.objectives.objective import NoObjective
from unicl_fast.objectives.registry import make_objective
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer

TEXTS = ["a photo of a dog!", "", "two people in the snow, seen from far away " * 9]

WITHOUT_US = """
import importlib.abc
import sys

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "unicl_fast":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refusing())
folder, texts = sys.argv[1], sys.argv[2:]

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

images = torch.load(f"{folder}/images.pt")
with torch.inference_mode():
    model = AutoModel.from_pretrained(f"{folder}/hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/hf")
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    found = model(pixel_values=images, **tokens)
    prepare = AutoImageProcessor.from_pretrained(f"{folder}/hf")
    photo = prepare([Image.open(f"{folder}/photo.png")], return_tensors="pt").pixel_values
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}/open_clip")
    theirs.eval()
    rows = open_clip.get_tokenizer(f"local-dir:{folder}/open_clip")(texts)
    encoder = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
    values = {
        "kind": type(model).__name__,
        "photo": photo.numpy(),
        "image": found.image_embeds.numpy(),
        "text": found.text_embeds.numpy(),
        "scores": found.logits_per_image.numpy(),
        "open_clip_image": theirs.encode_image(images, normalize=True).numpy(),
        "open_clip_text": theirs.encode_text(rows, normalize=True).numpy(),
        "features": encoder(images).numpy(),
    }
assert "unicl_fast" not in sys.modules
np.savez(f"{folder}/found.npz", **values)
"""


def assert_they_load(model: UniCL, folder: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    write_export(model, folder / "hf")
    write_open_clip(model, folder / "open_clip")
    write_timm(model, folder / "timm")
    size = model.config.data.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    torch.save(images, folder / "images.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    use = load_model(folder / "hf", device="cpu")
    photo = Image.fromarray(pixels).resize((3 * size, 2 * size))
    photo.save(folder / "photo.png")
    command = [sys.executable, "-c", WITHOUT_US, str(folder), *TEXTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(folder / "found.npz")
    assert found["kind"] == kind
    tokens = Tokenizer(model.config.model.context_length)(TEXTS)
    with torch.inference_mode():
        image, text = model.encode_image(images).numpy(), model.encode_text(tokens).numpy()
        expected = {
            "image": image, "open_clip_image": image, "text": text, "open_clip_text": text,
            "features": model.image_encoder(images).numpy(),
        }  # fmt: skip
    for name, ours in expected.items():
        assert ours.std(axis=0).max() > 1e-4, "inputs are told apart"
        np.testing.assert_allclose(found[name], ours, rtol=1e-5, atol=1e-5, err_msg=name)
    scale = model.logit_scale.exp().item()
    np.testing.assert_allclose(found["scores"], scale * image @ text.T, rtol=1e-4, atol=1e-4)
    data = model.config.data
    prepared = (use.prepare(photo) / 255 - data.mean) / data.std
    difference = np.abs(found["photo"][0].transpose(1, 2, 0) - prepared) * data.std * 255
    assert difference.mean() < 3, "levels of 255; Pillow's edges differ"
    again = use.encoders.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


SMALL = {"vit_xsmall_patch16_clip_224": 224, "test_efficientnet": 160}
"""Of the classes that vit-base's recipe and photos-small have, and their image sizes."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *SMALL,
        *(
            pytest.param(preset, marks=pytest.mark.long)
            for preset in ("vit-base", "swin-tiny", "resnet50", "photos-small")
        ),
    ],
)
def test_small_encoders_and_the_presets(name, tmp_path):
    """The preset auto chooses the last one for photographs if ImageNet's weights are installed."""
    if name in SMALL:
        config = small_config(name, SMALL[name])
    else:
        config = build_preset(name).changed(model={"init_image": ""})
    kind = "CLIPModel" if "clip" in name else "VisionTextDualEncoderModel"
    assert_they_load(model_with_weights_that_matter(config), tmp_path, kind)


def test_what_transformers_cannot_compute_has_our_own_layout(tmp_path):
    config = small_config()
    others = [
        {"model": dataclasses.replace(config.model, **changes)}
        for changes in (
            {"text_causal": False}, {"text_pool": "last"}, {"text_projection": "biased"},
            {"image_encoder": "unicl_convnet7_small"}, {"vocab_size": 1000},
        )
    ]  # fmt: skip
    others += [{"objective": one} for one in (make_objective("sigmoid"), NoObjective())]
    with torch.device("meta"):
        assert layout_of(build_model(config)) == "vision-text-dual-encoder"
        for changes in others:
            model = build_model(dataclasses.replace(config, **changes))
            assert layout_of(model) == "unicl", changes
    with pytest.raises(ValueError, match="image encoder by itself.*timm or onnx"):
        write_export(model, tmp_path / "out")
