"""open_clip's models give the same features here: the table of docs/checkpoints.md.

Weights are drawn by open_clip, so nothing is downloaded; `pytest -s` shows the table.
"""

from __future__ import annotations

import gc
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip_folders import (
    config_for,
    different_images,
    draw_open_clip,
    largest_difference,
    write_folder,
)

from unicl_fast import build_model
from unicl_fast.conversion.initial import initialise
from unicl_fast.conversion.open_clip import write_open_clip
from unicl_fast.text.tokenizer import Tokenizer

MODELS = [
    *("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-32-256"),
    *("RN50", "RN50-quickgelu", "RN101", "convnext_base", "EVA02-B-16", "ViTamin-S"),
    *("swin_base_patch4_window7_224", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP-256", "MobileCLIP-S1"),
    *("ViT-L-14", "ViT-L-14-quickgelu"),
]
LARGE = ("ViT-L-14", "ViT-L-14-quickgelu", "ViT-B-16-SigLIP-256", "swin_base_patch4_window7_224")
OF_TIMM = ("convnext_base", "EVA02-B-16")  # as ViTamin-S is, which is smaller
OF_OTHER_SIZES = ("ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-32-256", "RN50-quickgelu", "RN101")
TEXTS = ("a photo of a dog", "", "two people and a horse in the snow, seen from far away")


@pytest.fixture(scope="module")
def rows() -> list[str]:
    print("\n| open_clip's model | image encoder here | images | texts | and back |")
    print("|---|---|---|---|---|")
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name in LARGE + OF_TIMM + OF_OTHER_SIZES))
        for name in MODELS
    ],
)
def test_a_model_of_open_clip_gives_its_features(
    name: str, rows: list[str], tmp_path: Path
) -> None:
    model_cfg = open_clip.get_model_config(name)
    # the texts below are CLIP's tokens; SigLIP's vocabulary is smaller
    model_cfg["text_cfg"].pop("hf_tokenizer_name", None)
    theirs = draw_open_clip(model_cfg)
    config = config_for(write_folder(theirs, model_cfg, tmp_path / "theirs"))
    ours = build_model(config)
    initialise(ours)
    ours.eval()
    size = config.data.image_size
    tokens = Tokenizer(config.model.context_length)(TEXTS).clamp(max=config.model.vocab_size - 1)
    inputs = {"images": different_images(size), "tokens": tokens}
    image, text = largest_difference(ours, theirs, **inputs)
    assert max(image, text) < 1e-4
    del theirs
    gc.collect()
    back = write_open_clip(ours, tmp_path / "back")
    print(f"| {name} | `{config.model.image_encoder}` | {image:.0e} | {text:.0e} | {back:.0e} |")


@pytest.mark.slow
@torch.inference_mode()
def test_the_attention_pool_of_a_resnet_takes_another_size(tmp_path: Path) -> None:
    """By itself timm resizes its table at every forward pass; here that is done once."""
    model_cfg = open_clip.get_model_config("RN50")
    folder = write_folder(draw_open_clip(model_cfg), model_cfg, tmp_path / "theirs")
    images = different_images(256)
    features = []
    for size in (224, 256):
        model = build_model(config_for(folder, image_size=size))
        initialise(model)
        features.append(model.eval().encode_image(images))
    torch.testing.assert_close(features[1], features[0], rtol=0, atol=1e-5)
