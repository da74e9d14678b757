"""Models of open_clip with weights that open_clip draws, in folders as it publishes them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from unicl_fast.config import DataConfig, ModelConfig, TrainConfig
from unicl_fast.conversion.sources import find_source

TEXT = {"context_length": 30, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
LIKE_SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": TIMM | {"timm_pool": "token", "timm_proj": "none"},
    "text_cfg": TEXT
    | {"vocab_size": 32_000, "no_causal_mask": True, "pool_type": "last"}
    | {"proj_bias": True, "mlp_ratio": 3.5}
    | {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
}
"""SigLIP 2 in little: timm's features as they are, all tokens see all, the last one is read."""
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "gelu": {"embed_dim": 24, "vision_cfg": TIMM, "text_cfg": TEXT},
    "quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": TIMM, "text_cfg": TEXT},
    "like-siglip": LIKE_SIGLIP,
    "like-mobileclip": {  # timm's classifier projects
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": TIMM | {"timm_pool": "token", "timm_proj": None},
        "text_cfg": TEXT | {"no_causal_mask": True},
    },
}
SMALL_VIT = {
    "embed_dim": 24,
    "vision_cfg": {"width": 256, "layers": 10, "patch_size": 16, "image_size": 64},
    "text_cfg": TEXT,
}
"""The smallest of open_clip's own image encoders that timm has, for small images."""


@torch.no_grad()
def draw_open_clip(model_cfg: dict[str, Any]) -> torch.nn.Module:
    """A model as open_clip builds and draws it, whose biases and scales matter too."""
    torch.manual_seed(3)
    config = {name: value for name, value in model_cfg.items() if name != "custom_text"}
    kind = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
    model = kind(**config).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim and tensor.numel() == max(tensor.shape):
            tensor.mul_(1 + 0.2 * torch.rand(tensor.shape))
            tensor.add_(0.05 * torch.rand(tensor.shape))
    return model


def write_folder(model: torch.nn.Module, model_cfg: dict[str, Any], folder: Path) -> Path:
    """The model as a folder of open_clip's, with statistics that nobody else has."""
    folder.mkdir(parents=True)
    values = {
        "model_cfg": model_cfg,
        "preprocess_cfg": {
            "mean": [0.4, 0.5, 0.6],
            "resize_mode": "squash",
            "std": [0.3, 0.2, 0.25],
            "interpolation": "bicubic",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def config_for(given: str | Path, *, image_size: int = 0, **settings: Any) -> TrainConfig:
    """The settings that a source needs, with it as `model.init`."""
    source = find_source(str(given))
    size = image_size or source.data.get("image_size", 224)
    return TrainConfig(
        data=DataConfig(image_size=size, evaluation_resize=size),
        model=dataclasses.replace(ModelConfig(**source.settings, init=str(given)), **settings),
    )


def different_images(size: int) -> torch.Tensor:
    """float32 [3 3 size size] that networks without training tell apart: noise, a slope, rings."""
    noise = torch.randn(3, size, size, generator=torch.Generator().manual_seed(1))
    y, x = torch.meshgrid(torch.linspace(-2, 2, size), torch.linspace(-2, 2, size), indexing="ij")
    return torch.stack([noise, torch.stack([x, y, -x]), torch.stack([(9 * x * y).sin()] * 3) - 1])
