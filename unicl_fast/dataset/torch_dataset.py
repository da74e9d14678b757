"""A packed data set for `torch.utils.data`, without DALI.

    dataset = TorchDataset(PackedDataset("packed/photos"), transform=v2.RandomResizedCrop(224))
    for images, tokens, labels in DataLoader(dataset, batch_size=256, shuffle=True, num_workers=8):
        batch = objectives.targets.collate(images, tokens, labels, prompts=dataset.prompts)

An item has one text, drawn by the training plan's rule: a caption, with label -1, or a prompt of a
label. The DataLoader orders the samples, so texts are drawn by epoch and sample, not by the
position in a run. torchdata's StatefulDataLoader resumes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.codec import open_image, pixels_of
from unicl_fast.system.keyed_random import fold_key, random_below, random_unit
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import CONTEXT_LENGTH, Tokenizer

_CAPTION_KEY, _LABEL_KEY, _KIND_KEY, _TEMPLATE_KEY = range(4)


class TorchDataset(Dataset[tuple[UInt8[Tensor, "h w 3"], Int64[Tensor, " l"], int]]):
    """Items (image, tokens, label) of a `PackedDataset` by sample number.

    The image is uint8 [h w 3], RGB; tokens are int64 [l], padded with 0; the label is the prompt's
    class in `prompts`, or -1 for a caption. Texts are a function of seed, epoch and sample number.
    """

    def __init__(
        self,
        packed: PackedDataset,
        *,
        transform: Callable[[Any], Any] | None = None,
        context_length: int = CONTEXT_LENGTH,
        seed: int = 0,
    ) -> None:
        """Builds the prompts of all classes.

        Args:
            packed: open; each DataLoader worker reads it separately.
            transform: maps a Pillow image to another, such as torchvision's crops and flips.
                Without it images keep their sizes, and can be stacked only if all are equal.
            context_length: tokens of a text.
            seed: of the choice of texts.
        """
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
        data = self.packed.image_bytes(index, verify=True)
        image = open_image(data.tobytes())
        if self.transform is not None:
            image = self.transform(image)
        row, label = self._text(index)
        tokens = np.zeros(self.context_length, np.int64)
        tokens[: len(row)] = row
        pixels = pixels_of(image)  # [h w 1] if grey
        copy = np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C")
        return torch.from_numpy(copy), torch.from_numpy(tokens), label

    def _text(self, index: int) -> tuple[Any, int]:
        """Token ids of the sample's text in this epoch, and its class or -1."""
        labels = self.packed.labels_of(index) if self.prompts.num_templates[0] else ()
        num_captions = int(self.packed.samples[index]["captions_count"])

        def key(kind: int) -> np.uint64:
            return np.uint64(fold_key(self.seed, self.epoch, kind))

        def below(kind: int, bound: int) -> int:
            return int(random_below(key(kind), np.uint64(index), bound))

        wants_caption = random_unit(key(_KIND_KEY), np.uint64(index)) < 0.5
        if num_captions and (wants_caption or len(labels) == 0):
            which = below(_CAPTION_KEY, num_captions)
            row = self.packed.caption_tokens(index, which, context_length=self.context_length)
            return row, -1
        if len(labels) == 0:
            raise ValueError(f"{self.packed.describe(index)} has neither a caption nor a prompt")
        label = int(labels[below(_LABEL_KEY, len(labels))])
        template = below(_TEMPLATE_KEY, int(self.prompts.num_templates[0]))
        row = self.prompts.tokens[int(self.prompts.rows_of(0, label, template))]
        return row, int(self.prompts.classes_of(0, label))
