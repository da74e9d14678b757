"""What is done to a training image beyond cropping and mirroring, in numbers.

A source's augmentation is one `Augmentation`: probabilities and ranges, nothing drawn. It is
written as a preset's name and changes to it (`unicl,blur=0.5`), for all data sets or for one of
them. Which numbers an image gets is the data plan's business, what they do to its pixels the
graph's; docs/augmentation.md says both in words.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Policy = Literal["none", "rand", "trivial", "auto"]

LARGEST_MAGNITUDE = 10.0
"""RandAugment's magnitudes run from 0 to this, as timm counts them."""
_MOST_POLICY_OPS = 8


def require(condition: bool, message: str) -> None:
    """Refuses a setting by a ValueError."""
    if not condition:
        raise ValueError(message)


def _require_rising(name: str, bounds: tuple[float, float], *, most: float) -> None:
    low, high = bounds
    require(
        0 < low <= high <= most and high < math.inf,
        f"{name} must rise above 0{f' up to {most:g} at most' if most < math.inf else ''}, "
        f"not {low:g}..{high:g}",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """One source's; the steps are taken in the order policy, jitter, grayscale, blur, erasing."""

    crop_scale: tuple[float, float] | None = None
    """Smallest and largest part of the area that a crop covers; None takes data.crop_scale."""
    flip: float | None = None
    """Chance of a horizontal flip; None takes data.flip_probability."""
    policy: Policy = "none"
    """RandAugment (rand), TrivialAugment Wide (trivial) or AutoAugment for ImageNet (auto)."""
    policy_ops: int = 2
    """Operations that RandAugment draws for an image."""
    policy_probability: float = 0.5
    """Chance that an operation RandAugment has drawn is carried out; timm's default is a half."""
    magnitude: float = 9.0
    """Strength of RandAugment's operations, 0 to 10: the m of timm's rand-m9-mstd0.5-inc1."""
    magnitude_std: float = 0.5
    """Standard deviation with which that strength is drawn anew for each operation."""
    brightness: float = 0.0
    """Colour jitter: a factor is drawn from 1 - brightness (at least 0) to 1 + brightness."""
    contrast: float = 0.0
    """The same for contrast."""
    saturation: float = 0.0
    """The same for saturation."""
    hue: float = 0.0
    """The hue is turned by up to so many whole turns either way; at most 0.5."""
    jitter_probability: float = 1.0
    """Chance that an image's colours are jittered."""
    grayscale: float = 0.0
    """Chance that an image loses its colours."""
    blur: float = 0.0
    """Chance of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the model's image."""
    erase: float = 0.0
    """Chance that a rectangle is erased: filled with the mean colour (data.mean)."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    """Smallest and largest part of the image that the rectangle covers."""
    erase_ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Smallest and largest height/width of the rectangle."""
    views: int = 1
    """2 shows each image twice: a second window, flip and augmentation of its own."""

    def __post_init__(self) -> None:
        require(
            self.policy in typing.get_args(Policy),
            f"policy must be one of {', '.join(typing.get_args(Policy))}, not {self.policy!r}",
        )
        for name in ("flip", "policy_probability", "jitter_probability", "grayscale", "blur",
                     "erase"):  # fmt: skip
            value = getattr(self, name)
            require(
                value is None or 0 <= value <= 1,
                f"{name} is a probability and must lie in 0 to 1, not {value}",
            )
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(
                0 <= value < math.inf, f"{name} must be 0 (leave it alone) or more, not {value}"
            )
        require(0 <= self.hue <= 0.5, f"hue must lie in 0 to 0.5 turns, not {self.hue}")
        require(
            1 <= self.policy_ops <= _MOST_POLICY_OPS,
            f"policy_ops must lie in 1 to {_MOST_POLICY_OPS}, not {self.policy_ops}",
        )
        require(
            0 <= self.magnitude <= LARGEST_MAGNITUDE,
            f"magnitude must lie in 0 to {LARGEST_MAGNITUDE:g}, not {self.magnitude}",
        )
        require(
            0 <= self.magnitude_std < math.inf,
            f"magnitude_std must be 0 or more, not {self.magnitude_std}",
        )
        if self.crop_scale is not None:
            _require_rising("crop_scale", self.crop_scale, most=1.0)
        _require_rising("blur_sigma", self.blur_sigma, most=20.0)
        _require_rising("erase_area", self.erase_area, most=1.0)
        _require_rising("erase_ratio", self.erase_ratio, most=math.inf)
        require(self.views in (1, 2), f"views must be 1 or 2, not {self.views}")

    @property
    def twists_colours(self) -> bool:
        """Whether colour jitter or loss of colour can happen."""
        return max(self.jitter_chance, self.grayscale) > 0

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        """Of colour jitter: brightness, contrast, saturation, hue."""
        return self.brightness, self.contrast, self.saturation, self.hue

    @property
    def jitter_chance(self) -> float:
        """Chance that colours are jittered by anything at all."""
        return self.jitter_probability if max(self.strengths) > 0 else 0.0

    @property
    def stages(self) -> int:
        """Operations of its policy that may follow each other on an image."""
        return {"none": 0, "rand": self.policy_ops, "trivial": 1, "auto": 2}[self.policy]

    @property
    def changes_pixels(self) -> bool:
        """Whether anything is done to an image once it is cut, resampled and mirrored."""
        return self.twists_colours or bool(self.stages) or max(self.blur, self.erase) > 0


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(),
    # What CLIP was trained with, and open_clip's default: nearly the whole image, no mirroring.
    "clip": Augmentation(crop_scale=(0.9, 1.0), flip=0.0),
    # AUG of UniCL's released config.py: rand-m9-mstd0.5-inc1, COLOR_JITTER 0.4, REPROB 0.25.
    "unicl": Augmentation(
        policy="rand", brightness=0.4, contrast=0.4, saturation=0.4, erase=0.25
    ),
    # SupCon's crop and colours with SimCLR's blur, as MoCo v2 has them too.
    "supcon": Augmentation(
        crop_scale=(0.2, 1.0),
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        jitter_probability=0.8,
        grayscale=0.2,
        blur=0.5,
        views=2,
    ),
}  # fmt: skip
"""Augmentations with a name."""

# timm's single number of that name: brightness, contrast and saturation at once.
_JITTER = ("brightness", "contrast", "saturation")


def parse_augmentation(text: str) -> Augmentation:
    """Reads NAME[,FIELD=VALUE...], for example `unicl,blur=0.5,blur_sigma=0.1..2`.

    NAME is one of `AUGMENTATIONS`, a FIELD one of `Augmentation` or `jitter` (brightness, contrast
    and saturation at once), and a range is written LOW..HIGH.

    Raises:
        ValueError: an unknown name or field, or a value that does not fit.
    """
    name, *changes = text.split(",")
    if name not in AUGMENTATIONS:
        raise ValueError(
            f"augmentation {text!r}: there is no {name!r} to start from; known are "
            f"{', '.join(AUGMENTATIONS)}"
        )
    values: dict[str, Any] = {}
    for change in changes:
        field, separator, value = change.partition("=")
        if not separator:
            raise ValueError(f"augmentation {text!r}: expected FIELD=VALUE, not {change!r}")
        if field == "jitter":
            values |= dict.fromkeys(_JITTER, _parse_value(text, field, value, hint=float))
        elif field in _FIELDS:
            values[field] = _parse_value(text, field, value, hint=_FIELDS[field])
        else:
            raise ValueError(
                f"augmentation {text!r}: no field {field!r}; fields are {', '.join(_FIELDS)}, and "
                f"jitter for {', '.join(_JITTER)} at once"
            )
    try:
        return dataclasses.replace(AUGMENTATIONS[name], **values)
    except ValueError as error:
        raise ValueError(f"augmentation {text!r}: {error}") from error


def check_augment_entries(entries: Sequence[str]) -> None:
    """Refuses entries of `data.augment` that cannot be read, whatever the data sets are.

    Raises:
        ValueError: says which, and why.
    """
    _split_entries(entries)


def check_views(entries: Sequence[str], *, objective: str) -> None:
    """SupCon looks at two views of each image, the other objectives at one.

    Raises:
        ValueError: `data.augment` shows another number.
    """
    views = {augmentation.views for augmentation in _split_entries(entries).values()}
    shown = " ".join(entries)
    if objective == "supcon" and views != {2}:
        raise ValueError(
            "objective.name=supcon compares two views of each image, but data.augment "
            f"({shown or 'empty'}) shows one; set --data.augment supcon, or add views=2, for "
            "example unicl,views=2"
        )
    if objective != "supcon" and 2 in views:
        raise ValueError(
            f"data.augment ({shown}) shows each image in two views, but objective.name="
            f"{objective} would not look at the second; add views=1, for example supcon,views=1"
        )


def augmentations_of(entries: Sequence[str], places: Sequence[Path | str]) -> list[Augmentation]:
    """Each data set's augmentation.

    Args:
        entries: as in `data.augment`: SPEC for all data sets, NAME:SPEC for those whose folder is
            called NAME (or whose path or URL ends with it); the more particular one counts.
        places: folders or URLs of the data sets.

    Raises:
        ValueError: an entry that cannot be read or names no data set, or some data sets with one
            view and some with two.
    """
    chosen = _split_entries(entries)
    general = chosen.pop("", Augmentation())
    spelled = [_spellings(place) for place in places]
    named = {name: tuple(part for part in _parts(name) if part != ".") for name in chosen}
    for name in named:
        if not any(_ends_with(paths, named[name]) for paths in spelled):
            raise ValueError(
                f"data.augment: no data set is called {name!r}; there are "
                f"{', '.join(paths[0][-1] for paths in spelled)}"
            )
    found = []
    for paths in spelled:
        fitting = [name for name, ending in named.items() if _ends_with(paths, ending)]
        # a longer ending says more
        longest = max((len(named[name]) for name in fitting), default=0)
        best = [name for name in fitting if len(named[name]) == longest]
        if len(best) > 1:
            raise ValueError(
                f"data.augment: {best[0]} and {best[1]} both name {paths[0][-1]}; give it one"
            )
        found.append(chosen[best[0]] if best else general)
    if len({augmentation.views for augmentation in found}) > 1:
        views = (
            f"{paths[0][-1]} {augmentation.views}"
            for paths, augmentation in zip(spelled, found, strict=True)
        )
        raise ValueError(
            "data.augment: a batch shows all its images once or all twice, but views are "
            f"{', '.join(views)}; set views=1 or views=2 for all"
        )
    return found


def _parts(place: Path | str) -> tuple[str, ...]:
    """Of a path, or of what follows the scheme of a URL."""
    _, scheme, rest = str(place).partition("://")
    return tuple(part for part in rest.split("/") if part) if scheme else Path(place).parts


def _spellings(place: Path | str) -> list[tuple[str, ...]]:
    """How a data set's place can be written: a link to a folder has two names."""
    if "://" in str(place):
        return [_parts(place)]
    return [Path(place).absolute().parts, Path(place).resolve().parts]


def _ends_with(paths: Sequence[tuple[str, ...]], ending: tuple[str, ...]) -> bool:
    return any(path[-len(ending) :] == ending for path in paths)


def _split_entries(entries: Sequence[str]) -> dict[str, Augmentation]:
    """Name of a data set, or "" for all, -> its augmentation."""
    chosen: dict[str, Augmentation] = {}
    for entry in entries:
        name, separator, spec = entry.rpartition(":")  # a spec has no colon, a folder may
        if separator and not name:
            raise ValueError(f"data.augment: expected NAME:SPEC or SPEC, not {entry!r}")
        if name in chosen:
            raise ValueError(
                f"data.augment: two entries for {name or 'all data sets'}: {' '.join(entries)}"
            )
        try:
            chosen[name] = parse_augmentation(spec)
        except ValueError as error:
            raise ValueError(f"data.augment: {error}") from error
    return chosen


_FIELDS = typing.get_type_hints(Augmentation)


def _parse_value(text: str, field: str, value: str, *, hint: Any) -> Any:
    if hint == Policy:
        return value  # which there are is checked with the others
    expected = "a whole number" if hint is int else "a number"
    try:
        if tuple[float, float] in (hint, *typing.get_args(hint)):  # or that or None
            expected = "a range LOW..HIGH"
            low, high = value.split("..")
            return float(low), float(high)
        return int(value) if hint is int else float(value)
    except ValueError as error:
        raise ValueError(
            f"augmentation {text!r}: {field} must be {expected}, not {value!r}"
        ) from error
