"""open_clip's models give the same features here: the table of docs/checkpoints.md.

Weights are drawn by open_clip, so nothing is downloaded; `pytest -s` shows the table.
"""

import gc

import open_clip
import pytest
import torch
from open_clip_folders import config_for, different_images, draw_open_clip, write_folder
from small_runs import real_images
from source_runs import config_by_name, largest_differences, started, train_one_step

from unicl_fast.conversion.initial import load_encoders
from unicl_fast.conversion.open_clip import write_open_clip

# torch 2.13 crashes in the backward pass of timm's fastvit_mci1 in channels_last on a CPU
UNTRAINABLE = "MobileCLIP-S1"
MODELS = ("ViT-B-32", "RN50")
LARGE_OR_LIKE_OTHERS = (
    UNTRAINABLE,
    *("ViT-L-14", "ViT-L-14-quickgelu", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP-256"),
    *("ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-32-quickgelu", "ViT-B-32-256", "ViTamin-S"),
    *("RN50-quickgelu", "RN101", "convnext_base", "EVA02-B-16", "swin_base_patch4_window7_224"),
)


@pytest.fixture(scope="module")
def rows() -> list[str]:
    print("\n| open_clip's model | image encoder here | images | texts | and back |")
    print("|---|---|---|---|---|")
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*MODELS, *(pytest.param(name, marks=pytest.mark.long) for name in LARGE_OR_LIKE_OTHERS)],
)
def test_a_model_of_open_clip_gives_its_features_and_is_trained_by_its_name(
    name, rows, shared_data, tmp_path
):
    model_cfg = open_clip.get_model_config(name)
    theirs = draw_open_clip(model_cfg)
    folder = write_folder(theirs, model_cfg, tmp_path / "theirs")
    ours = load_encoders(folder)
    image, text = largest_differences(ours, theirs)
    assert max(image, text) < 1e-5
    del theirs
    gc.collect()
    back = write_open_clip(ours, tmp_path / "back")
    print(
        f"| {name} | `{ours.config.model.image_encoder}` | {image:.0e} | {text:.0e} | {back:.0e} |"
    )
    del ours
    gc.collect()
    if name == UNTRAINABLE:
        return
    config = config_by_name(folder, "--model.drop-path", "0")
    train_one_step(config, real_images(shared_data, 3), tmp_path / "run")


@pytest.mark.slow
@torch.inference_mode()
def test_the_attention_pool_of_a_resnet_takes_another_size(tmp_path):
    """By itself timm resizes its table at every forward pass; here that is done once."""
    model_cfg = open_clip.get_model_config("RN50")
    folder = write_folder(draw_open_clip(model_cfg), model_cfg, tmp_path / "theirs")
    images = different_images(256)
    small, large = (
        started(config_for(folder, image_size=size)).encode_image(images) for size in (224, 256)
    )
    torch.testing.assert_close(large, small, rtol=0, atol=1e-5)
