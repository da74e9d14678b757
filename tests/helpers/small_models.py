"""Small models for conversions, whose settings and weights all matter."""

from collections.abc import Mapping
from pathlib import Path

import torch

from unicl_fast import UniCL, build_model
from unicl_fast.checkpoints.files import write_checkpoint
from unicl_fast.checkpoints.load import MODEL_FILE, OPTIMIZER_FILE
from unicl_fast.config import DataConfig, ModelConfig, TrainConfig
from unicl_fast.config_json import config_to_dict
from unicl_fast.objectives.registry import make_objective


def small_config(image_encoder: str = "test_vit", image_size: int = 160) -> TrainConfig:
    """A timm model with position tables, and statistics that nobody else has."""
    return TrainConfig(
        data=DataConfig(
            train=("/home/somebody/secret=0.5",),
            image_size=image_size,
            evaluation_resize=image_size + 37,
            interpolation="bicubic",
            mean=(0.4, 0.5, 0.6),
            std=(0.3, 0.2, 0.25),
            augment=("unicl", "secret:clip,erase=0.5"),
        ),
        model=ModelConfig(
            image_encoder=image_encoder,
            text_width=32,
            text_layers=2,
            text_heads=2,
            embed_dim=24,
            context_length=30,
        ),
        objective=make_objective(logit_scale_max=float("inf")),
    )


def model_with_weights_that_matter(config: TrainConfig) -> UniCL:
    """No bias is 0, no scale 1."""
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator).abs())
    return model


def write_run(
    folder: Path, config: TrainConfig, weights: Mapping[str, torch.Tensor] = {}, **state: object
) -> dict[str, torch.Tensor]:
    """A run as training leaves it; returns its weights, by default some that no fresh model has."""
    fresh = {} if weights else build_model(config).state_dict()
    own = {name: one * 0.9 if one.is_floating_point() else one for name, one in fresh.items()}
    own |= weights
    write_checkpoint(
        folder / "checkpoints",
        step=2,
        files={MODEL_FILE: own, OPTIMIZER_FILE: {}},
        state={"config": config_to_dict(config), "scaler": {}, "data": {}, "optimizer": "AdamW",
               "run_id": "a"} | state,
    )  # fmt: skip
    return own
