"""A packed data set for `torch.utils.data`, without DALI.

    dataset = TorchDataset(PackedDataset("packed/photos"), transform=v2.RandomResizedCrop(224))
    for images, tokens, labels in DataLoader(dataset, batch_size=256, shuffle=True, num_workers=8):
        batch = collate(images, tokens, labels, prompts=dataset.prompts)

An item has one text, drawn anew for each epoch: a caption, with label -1, or a prompt of a label.
torchdata's StatefulDataLoader resumes exactly.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer


class TorchDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """Items by sample number: image uint8 [h w 3], tokens int64 [l], class in `prompts` or -1."""

    def __init__(
        self,
        packed: PackedDataset,
        *,
        transform: Callable[[Any], Any] = lambda image: image,
        context_length: int = 77,
        seed: int = 0,
    ) -> None:
        """`transform` maps a Pillow image to another, such as torchvision's crops and flips."""
        self.packed, self.transform, self.seed = packed, transform, seed
        self.epoch = 0
        """Set it before each epoch; it affects the choice of texts."""
        self.context_length = context_length
        manifest = packed.manifest
        self.prompts = ClassPrompts(
            [(manifest.class_names, manifest.templates)], Tokenizer(context_length)
        )

    def __len__(self) -> int:
        return len(self.packed)

    def state_dict(self) -> dict[str, int]:
        """Seed and epoch of the texts, which StatefulDataLoader saves with its own state."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Restores the choice of texts."""
        self.seed, self.epoch = state_dict["seed"], state_dict["epoch"]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """The sample; DamagedSampleError names a damaged one."""
        file = io.BytesIO(self.packed.image_bytes(index, verify=True).tobytes())
        image = self.transform(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
        row, label = self._text(index)
        tokens = np.zeros(self.context_length, np.int64)
        tokens[: len(row)] = row
        return torch.from_numpy(np.array(image)), torch.from_numpy(tokens), label

    def _text(self, index: int) -> tuple[Any, int]:
        """Token ids of the sample's text in this epoch, and its class or -1."""
        drawn = np.random.default_rng((self.seed, self.epoch, index))
        labels = self.packed.labels_of(index) if self.prompts.num_templates[0] else ()
        num_captions = int(self.packed.samples[index]["captions_count"])
        if num_captions and (len(labels) == 0 or drawn.random() < 0.5):
            which = int(drawn.integers(num_captions))
            row = self.packed.caption_tokens(index, which, context_length=self.context_length)
            return row, -1
        if len(labels) == 0:
            raise ValueError(f"{self.packed.describe(index)} has neither a caption nor a prompt")
        label = int(labels[drawn.integers(len(labels))])
        template = int(drawn.integers(self.prompts.num_templates[0]))
        row = self.prompts.tokens[int(self.prompts.rows_of(0, label, template))]
        return row, int(self.prompts.classes_of(0, label))
