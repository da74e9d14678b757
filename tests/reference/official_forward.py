"""microsoft/UniCL's released models out of torchvision's Swin and open_clip's text encoder.

Weights matter: none are zeros or ones. `entries` are those of a released file. Nothing here knows
timm or our models.
"""

import functools
import re

import torch
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer

SIZES = {"swin-tiny": (96, [2, 2, 6, 2]), "swin-base": (128, [2, 2, 18, 2])}


class OfficialModel:
    """A released model, drawn by its seed."""

    def __init__(self, name: str, *, seed: int = 0) -> None:
        width, depths = SIZES[name]
        heads = [width // 32 << stage for stage in range(4)]
        torch.manual_seed(seed)
        self._image = SwinTransformer([4, 4], width, depths, heads, [7, 7]).eval()
        self._image.head = nn.Identity()
        kinds = {"act_layer": QuickGELU, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-12)}
        self._text = TextTransformer(width=512, heads=8, layers=12, output_dim=512, **kinds).eval()
        with torch.no_grad():
            for part in (self._image, self._text):
                for name, tensor in part.named_parameters():
                    if tensor.ndim == 1:
                        tensor.add_(torch.randn_like(tensor), alpha=0.2)
                    else:
                        is_table = "embedding" in name or "table" in name
                        tensor.normal_(std=0.4 if is_table else tensor[0].numel() ** -0.5)
        self._projection = torch.randn(8 * width, 512) / (8 * width) ** 0.5
        self.entries = self._image_entries() | {
            f"text_encoder.{name.removeprefix('transformer.')}": tensor
            for name, tensor in self._text.state_dict().items()
            if name not in ("text_projection", "attn_mask")
        }
        self.entries["image_projection"] = self._projection
        self.entries["text_projection"] = self._text.text_projection.detach()
        # above ln 100: the released ones are not clamped
        self.entries["logit_scale"] = torch.tensor(4.7)

    def _image_entries(self) -> dict[str, Tensor]:
        entries: dict[str, Tensor] = {}
        for name, tensor in self._image.state_dict().items():
            name = name.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            name = name.replace("features.0.0.", "patch_embed.proj.")
            name = name.replace("features.0.2.", "patch_embed.norm.")
            if found := re.match(r"features\.(\d)\.(\d+\.)?", name):
                stage, is_merging = divmod(int(found[1]) - 1, 2)
                inner = "downsample." if is_merging else f"blocks.{found[2]}"
                name = f"layers.{stage}.{inner}{name[found.end() :]}"
            if name.endswith("relative_position_index"):
                tensor = tensor.view(49, 49)
            entries[f"image_encoder.{name}"] = tensor
            if re.fullmatch(r"layers\.[012]\.blocks\.\d?[13579]\.norm1\.weight", name):
                mask = torch.zeros((8 >> int(name[7])) ** 2, 49, 49)  # nobody reads it
                entries[f"image_encoder.{name.replace('norm1.weight', 'attn_mask')}"] = mask
        return entries

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Unit-norm features [b 512] of normalised images [b 3 224 224]."""
        return F.normalize(self._image(images) @ self._projection, dim=1)

    @torch.no_grad()
    def text_features(self, tokens: Tensor) -> Tensor:
        """Unit-norm features [n 512] of token rows [n 77], read at the largest token id."""
        return F.normalize(self._text(tokens), dim=1)
