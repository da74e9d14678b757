"""A trained model for use: images by path, Pillow image or array, and plain texts.

    model = unicl_fast.load_model("runs/first")
    model.classify(["cat.jpg"], ["cat", "dog"])  # [{"cat": 0.97, "dog": 0.03}]
    model.embed_images(["cat.jpg"]) @ model.embed_texts(["a photo of a cat"]).T

Images are prepared as in evaluations, by the same kernel and with the run's sizes. Pillow decodes
them, so neither a packed data set nor DALI is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unicl_fast.conversion.initial import load_encoders
from unicl_fast.evaluation.features import (
    encode_images,
    encode_token_rows,
    on_device,
    require_text_encoder,
)
from unicl_fast.evaluation.zero_shot import zero_shot_classifier
from unicl_fast.images.codec import ImageError, open_image, pillow_limits, pixels_of
from unicl_fast.images.limits import MAX_PIXELS
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.kernels.resample import resample_region
from unicl_fast.pipelines.plan.crop import evaluation_regions, fill_borders
from unicl_fast.system.bar import Bar
from unicl_fast.system.machine import choose_device
from unicl_fast.system.untrusted_files import read_file
from unicl_fast.text.class_lists import SIMPLE_TEMPLATES, check_templates
from unicl_fast.training.data import tokenizer_of

_RANKED_AT_ONCE = 8192  # images scored at once: 33 MB for a thousand classes
_MOST_FILE_BYTES = 512_000_000
ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]"


def load_model(path: str | Path, *, device: str = "auto") -> Model:
    """Loads a model for use, ours or one of another library.

    Args:
        path: RUN for its newest checkpoint, RUN/best, a checkpoint, an export; a folder of
            open_clip's, transformers' or timm's; or open-clip:NAME/TAG, hf-hub:OWNER/NAME,
            official:FILE, timm:NAME or pypi:NAME, as docs/checkpoints.md says.
        device: auto, cpu or cuda.

    Raises:
        FileNotFoundError: no model there.
        ValueError: damaged, an architecture that we do not have, or no such device.
    """
    encoders = load_encoders(path)
    return Model(on_device(encoders, choose_device(device)))


class Model:
    """A model in evaluation mode, on its device."""

    def __init__(self, encoders: UniCL) -> None:
        """Wraps any UniCL, such as a trainer's, and switches it to evaluation mode."""
        self.encoders = encoders.eval()
        """The module itself."""

    def classify(
        self,
        images: Sequence[ImageLike],
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = SIMPLE_TEMPLATES,
        top: int = 5,
        batch_size: int = 64,
        progress: bool = True,
    ) -> list[dict[str, float]]:
        """Names each image by the class whose prompts are most similar to it.

        Args:
            images: paths, Pillow images, or arrays uint8 [h w], [h w 1] or [h w 3].
            class_names: two or more, in words, each once.
            templates: prompts with one "{}" for the name; several are averaged.
            top: classes returned for each image.
            batch_size: images encoded at once.
            progress: shows a bar after two seconds.

        Returns:
            For each image its most probable classes, best first, with probabilities over all
            classes.

        Raises:
            ValueError: the model has no text encoder; an image cannot be read (an ImageError, which
                names it); names or templates cannot be used.
            FileNotFoundError: no such image.
        """
        self.require_classes(class_names)
        features = self._encode(images, batch_size=batch_size, progress=progress)
        return self.rank_classes(features, class_names, templates=templates, top=top)

    def require_classes(self, class_names: Sequence[str]) -> None:
        """ValueError for names that cannot be told apart, or a model without texts."""
        names = [class_names] if isinstance(class_names, str) else list(class_names)
        if len(names) < 2 or len(set(names)) < len(names) or not all(map(str.strip, names)):
            raise ValueError(f"two or more class names are needed, each once; {names} came")
        require_text_encoder(self.encoders, "classify")

    @torch.no_grad()
    def rank_classes(
        self,
        features: Float[Tensor, "n d"],
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = SIMPLE_TEMPLATES,
        top: int = 5,
    ) -> list[dict[str, float]]:
        """As `classify`, from unit-norm features."""
        self.require_classes(class_names)
        names = list(class_names)
        checked = check_templates(tuple(templates), origin="templates")
        rows = zero_shot_classifier(self.encoders, names, templates=checked)
        classifier = self.encoders.logit_scale.exp() * rows
        found = []
        for part in features.split(_RANKED_AT_ONCE):
            scores = part.to(classifier.device, classifier.dtype) @ classifier.T
            values, places = scores.float().softmax(dim=-1).topk(min(top, len(names)), dim=-1)
            found += [
                {names[place]: value for value, place in zip(*row, strict=True)}
                for row in zip(values.tolist(), places.tolist(), strict=True)
            ]
        return found

    def embed_images(
        self, images: Sequence[ImageLike], *, batch_size: int = 64, progress: bool = True
    ) -> Float[np.ndarray, "n d"]:
        """Unit-norm features of images in float32; arguments and errors as for `classify`.

        A model trained by cross-entropy returns its image encoder's features.
        """
        return self._encode(images, batch_size=batch_size, progress=progress).numpy()

    def embed_texts(
        self, texts: Sequence[str], *, batch_size: int = 512, progress: bool = True
    ) -> Float[np.ndarray, "m d"]:
        """Unit-norm features of texts in float32; texts beyond the model's context are cut.

        Raises ValueError if the model has no text encoder, or there are no texts.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts: [text] for one")
        require_text_encoder(self.encoders, "embed_texts")
        rows = tokenizer_of(self.encoders.config).encode(list(texts))
        features = encode_token_rows(self.encoders, rows, batch_size=batch_size, progress=progress)
        return features.float().cpu().numpy()

    def prepare(self, image: ImageLike) -> NDArray[np.uint8]:
        """Decodes an image and crops it for the model: uint8 [size size 3].

        Raises ImageError if it cannot be read or is too large, and FileNotFoundError.
        """
        data = self.encoders.config.data
        pixels = _pixels(image)
        height, width = pixels.shape[:2]
        heights, widths = np.array([height]), np.array([width])
        (start,), (end,) = evaluation_regions(heights, widths, data)
        crop = np.empty((data.image_size, data.image_size, 3), np.uint8)
        whole = np.ascontiguousarray(np.broadcast_to(pixels, (height, width, 3)))
        (top, left), (bottom, right) = start.tolist(), end.tolist()
        cubic = data.interpolation == "bicubic"
        resample_region(crop, whole, top, bottom, left, right, False, cubic)
        fill_borders(crop[None], heights, widths, data)
        return crop

    def _encode(
        self, images: Sequence[ImageLike], *, batch_size: int, progress: bool
    ) -> Float[Tensor, "n d"]:
        if isinstance(images, (str, os.PathLike)) or not len(images):
            raise ValueError("images must be a list of paths, Pillow images or arrays, not empty")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        rows = []
        with Bar(desc="encode images", total=len(images), shown=progress) as bar:
            for start in range(0, len(images), batch_size):
                prepared = [self.prepare(image) for image in images[start : start + batch_size]]
                batch = torch.from_numpy(np.stack(prepared))
                rows.append(encode_images(self.encoders, batch).float().cpu())
                bar.update(len(batch))
        return torch.cat(rows)


def classes_by_column(
    class_names: Iterable[Sequence[str]], columns: Iterable[Mapping[str, Sequence[int]]]
) -> dict[str, tuple[str, ...]]:
    """The class names of data sets by label column, each once; `columns` as in `Manifest.columns`.

    Of several columns one with a single class, where nothing is to be chosen, is left out.
    """
    found: dict[str, dict[str, None]] = {}
    for names, of_set in zip(class_names, columns, strict=True):
        for column, numbers in of_set.items():
            found.setdefault(column, {}).update(dict.fromkeys(names[one] for one in numbers))
    some = {column: names for column, names in found.items() if len(names) > 1}
    return {column: tuple(names) for column, names in (some or found).items()}


def _pixels(image: ImageLike) -> NDArray[np.uint8]:
    """The pixels of an image, upright: uint8 [h w 1] or [h w 3]."""
    if isinstance(image, np.ndarray):
        pixels = image[..., None] if image.ndim == 2 else image
        if image.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
            raise ImageError(
                "unsupported",
                "an array must be uint8 [h w], [h w 1] or [h w 3], "
                f"not {image.dtype} {list(image.shape)}",
            )
        if not pixels.size:
            raise ImageError("damaged", f"the array {list(image.shape)} has no pixels")
        return pixels
    if isinstance(image, Image.Image):
        return pixels_of(image)
    try:
        with pillow_limits(MAX_PIXELS):
            return pixels_of(open_image(read_file(image, most_bytes=_MOST_FILE_BYTES)))
    except ImageError as error:
        raise ImageError(error.kind, f"{os.fspath(image)}: {error}") from error
