"""Runs that start from a source of which only the name is given."""

from pathlib import Path
from typing import Any

import torch
from open_clip_folders import different_images
from torch.nn import functional as F

from unicl_fast import UniCL, build_model, make_trainer
from unicl_fast.checkpoints.export import PIXELS
from unicl_fast.config import TrainConfig
from unicl_fast.conversion.initial import initialise
from unicl_fast.objectives.targets import collate
from unicl_fast.tools.pretrain import parse_arguments, split_config


def tokens_of(config: TrainConfig) -> torch.Tensor:
    """Three token rows of different lengths, each with an end."""
    length, size = config.model.context_length, config.model.vocab_size
    rows = torch.randint(1, size - 2, (3, length), generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((3, length // 2, length - 1)):
        rows[row, end] = size - 1
        rows[row, end + 1 :] = 0
    return rows


@torch.inference_mode()
def largest_differences(ours: UniCL, theirs: torch.nn.Module) -> tuple[float, float]:
    """Of the coordinates of unit vectors: those of three images, those of three texts."""
    images, tokens = different_images(ours.config.data.image_size), tokens_of(ours.config)
    if hasattr(theirs, "encode_image"):
        features = theirs.encode_image(images), theirs.encode_text(tokens)
    else:  # of transformers
        found = theirs(input_ids=tokens, pixel_values=images)
        features = found.image_embeds, found.text_embeds
    expected = [F.normalize(one, dim=-1) for one in features]
    assert all(one.std(dim=0).max() > 1e-4 for one in expected)  # inputs differ
    pairs = zip((ours.encode_image(images), ours.encode_text(tokens)), expected, strict=True)
    image, text = ((one - other).abs().max().item() for one, other in pairs)
    return image, text


def difference(ours: UniCL, theirs: torch.nn.Module) -> float:
    return max(largest_differences(ours, theirs))


def config_by_name(source: object, *options: str) -> TrainConfig:
    """The settings of a run of which only the source is said."""
    given = ["--init", str(source), "--out", "out", *options]
    return split_config(parse_arguments(given))


def started(config: TrainConfig) -> UniCL:
    """A run's model with the weights that it starts from."""
    model = build_model(config)
    initialise(model)
    return model.eval()


def pixels_of(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config.data, name) for name in PIXELS}


def train_one_step(config: TrainConfig, images: torch.Tensor, folder: Path) -> UniCL:
    """A run's first step from its source, without data sets."""
    config = config.changed(run={"global_batch_size": 3, "steps": 1, "device": "cpu"})
    model = started(config).train()
    before = model.image_projection if model.image_projection is not None else model.text_projection
    before = before.detach().clone()
    size = config.data.image_size
    pixels = F.interpolate(images.permute(0, 3, 1, 2).float(), size=(size, size)).byte()
    batch = collate(pixels.permute(0, 2, 3, 1), tokens_of(config), torch.tensor([-1, -1, -1]))
    trainer = make_trainer(config, [batch], run_folder=folder, model=model)
    trainer.train_step(batch)
    after = model.image_projection if model.image_projection is not None else model.text_projection
    assert (after.detach().cpu() != before).any()
    return model.eval()
