"""Augmentation of training images beyond cropping and flipping: probabilities and ranges.

Written as a preset's name and changes to it (`unicl,erase=0.5`). See docs/augmentation.md.
"""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from unicl_fast.system.checked_fields import (
    LARGEST_FLOAT,
    Fraction,
    NonNegative,
    PositiveFraction,
    check_fields,
    plain_value,
    require,
)

Policy = Literal["none", "rand"]

LARGEST_MAGNITUDE = 10.0  # randAugment's magnitudes run from 0 to this, as in timm

Ratio = Annotated[float, Meta(gt=0, le=LARGEST_FLOAT)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Augmentation of a data set, applied in the order policy, jitter, grayscale, erasing."""

    crop_scale: tuple[PositiveFraction, PositiveFraction] | None = None
    """Smallest and largest fraction of the area that a crop covers; None uses data.crop_scale."""
    flip: Fraction | None = None
    """Probability of a horizontal flip; None uses data.flip_probability."""
    policy: Policy = "none"
    """RandAugment (rand) or none."""
    policy_ops: Annotated[int, Meta(ge=1, le=8)] = 2
    """Operations that RandAugment draws for an image."""
    policy_probability: Fraction = 0.5
    """Probability that an operation drawn by RandAugment is applied; timm's default is a half."""
    magnitude: Annotated[float, Meta(ge=0, le=LARGEST_MAGNITUDE)] = 9.0
    """Strength of RandAugment's operations, 0 to 10: the m of timm's rand-m9-mstd0.5-inc1."""
    magnitude_std: NonNegative = 0.5
    """Standard deviation of that strength, drawn anew for each operation."""
    brightness: NonNegative = 0.0
    """Colour jitter: a factor is drawn from 1 - brightness (at least 0) to 1 + brightness."""
    contrast: NonNegative = 0.0
    """The same for contrast."""
    saturation: NonNegative = 0.0
    """The same for saturation."""
    hue: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    """The hue is turned by up to this fraction of a full turn either way."""
    jitter_probability: Fraction = 1.0
    """Probability that an image's colours are jittered."""
    grayscale: Fraction = 0.0
    """Probability that an image becomes grayscale."""
    erase: Fraction = 0.0
    """Probability that a rectangle is erased: filled with the mean colour (data.mean)."""
    erase_area: tuple[PositiveFraction, PositiveFraction] = (0.02, 1 / 3)
    """Smallest and largest fraction of the image that the rectangle covers."""
    erase_ratio: tuple[Ratio, Ratio] = (0.3, 1 / 0.3)
    """Smallest and largest height/width of the rectangle."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("crop_scale", "erase_area", "erase_ratio"):
            low, high = getattr(self, name) or (0, 0)
            require(low <= high, f"{name} must not fall, as {low:g}..{high:g} does")

    @property
    def changes_colours(self) -> bool:
        """Whether colours can be jittered or lost."""
        return max(self.jitter_chance, self.grayscale) > 0

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        """The strengths of colour jitter: brightness, contrast, saturation, hue."""
        return self.brightness, self.contrast, self.saturation, self.hue

    @property
    def jitter_chance(self) -> float:
        """Probability that colours are jittered with any strength."""
        return self.jitter_probability if max(self.strengths) > 0 else 0.0

    @property
    def stages(self) -> int:
        """The most operations of its policy that follow each other on an image."""
        return self.policy_ops if self.policy == "rand" else 0

    @property
    def changes_pixels(self) -> bool:
        """Whether an image is changed after cropping, resizing and flipping."""
        return self.changes_colours or bool(self.stages) or self.erase > 0


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(),
    # CLIP's training and open_clip's default: nearly the whole image, no flips
    "clip": Augmentation(crop_scale=(0.9, 1.0), flip=0.0),
    # AUG of UniCL's released config.py: rand-m9-mstd0.5-inc1, COLOR_JITTER 0.4, REPROB 0.25.
    "unicl": Augmentation(
        policy="rand", brightness=0.4, contrast=0.4, saturation=0.4, erase=0.25
    ),
}  # fmt: skip

_FIELDS = typing.get_type_hints(Augmentation)
# timm's single number of that name sets all three
_JITTER = ("brightness", "contrast", "saturation")
_LEFT = dict.fromkeys(("views", "blur", "blur_sigma"), "leave it out") | {
    "supcon": "without its second view and its blur it is none,crop_scale=0.2..1,jitter=0.4,"
    "hue=0.1,jitter_probability=0.8,grayscale=0.2"
}
"""Fields and a preset of earlier versions, and what replaces them."""


def parse_augmentation(text: str) -> Augmentation:
    """Reads NAME[,FIELD=VALUE...], for example `unicl,erase=0.5,erase_area=0.1..0.2`.

    NAME is one of `AUGMENTATIONS`, a FIELD one of `Augmentation` or `jitter` (brightness, contrast
    and saturation at once), and a range is LOW..HIGH. Raises ValueError for anything else.
    """
    name, *changes = text.split(",")
    try:
        for one in (name, *changes):
            key = one.partition("=")[0]
            require(key not in _LEFT, f"{one} has left: {_LEFT.get(key)}")
        require(
            name in AUGMENTATIONS,
            f"there is no {name!r} to start from; known are {', '.join(AUGMENTATIONS)}",
        )
        values: dict[str, Any] = {}
        for change in changes:
            field, separator, value = change.partition("=")
            require(bool(separator), f"expected FIELD=VALUE, not {change!r}")
            require(
                field in _FIELDS or field == "jitter",
                f"no field {field!r}; fields are {', '.join(_FIELDS)}, and jitter for "
                f"{', '.join(_JITTER)} at once",
            )
            for name_of_field in _JITTER if field == "jitter" else (field,):
                kind = _FIELDS[name_of_field]  # `Augmentation` checks the policy
                values[name_of_field] = (
                    value if kind == Policy else plain_value(value, kind, name=field)
                )
        return dataclasses.replace(AUGMENTATIONS[name], **values)
    except ValueError as error:
        raise ValueError(f"augmentation {text!r}: {error}") from error


def read_entries(entries: Sequence[str]) -> dict[str, Augmentation]:
    """Reads `data.augment`: augmentations by data set name, "" for all; ValueError if it cannot."""
    chosen: dict[str, Augmentation] = {}
    for entry in entries:
        name, separator, spec = entry.rpartition(":")  # a spec has no colon, a folder may
        try:
            require(bool(name) or not separator, f"expected NAME:SPEC or SPEC, not {entry!r}")
            require(
                name not in chosen,
                f"two entries for {name or 'all data sets'}: {' '.join(entries)}",
            )
            chosen[name] = parse_augmentation(spec)
        except ValueError as error:
            raise ValueError(f"data.augment: {error}") from error
    return chosen


def augmentations_of(entries: Sequence[str], places: Sequence[Path | str]) -> list[Augmentation]:
    """Each data set's augmentation, by the entries of `data.augment`.

    An entry is SPEC for all data sets, or NAME:SPEC for those whose folder is called NAME (or whose
    path or URL, in `places`, ends with it); the longest matching NAME counts. Raises ValueError for
    an entry that is invalid or names no data set.
    """
    chosen = read_entries(entries)
    general = chosen.pop("", Augmentation())
    endings = {name: _path(name) for name in chosen}
    names: list[str] = []
    found: list[Augmentation] = []
    named: set[str] = set()
    for place in places:
        paths = [_path(place)]
        if "://" not in str(place):  # a symbolic link adds a second one
            paths = [str(Path(place).absolute()), str(Path(place).resolve())]
        names.append(paths[0].rpartition("/")[2])
        fits = [name for name, end in endings.items() if any(path.endswith(end) for path in paths)]
        longest = max((endings[name].count("/") for name in fits), default=0)
        best = [name for name in fits if endings[name].count("/") == longest]
        require(
            len(best) < 2, f"data.augment: {' and '.join(best)} both name {names[-1]}; give it one"
        )
        found.append(chosen[best[0]] if best else general)
        named.update(fits)
    for name in chosen:
        require(
            name in named,
            f"data.augment: no data set is called {name!r}; there are {', '.join(names)}",
        )
    return found


def _path(name: Path | str) -> str:
    """A relative path, or a URL without its scheme, with a slash before every part."""
    rest = str(name).partition("://")[2] or str(name)
    return "".join(f"/{part}" for part in rest.split("/") if part not in ("", "."))
