"""The options of `unicl-pack build`, their help, and their checks."""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin, get_type_hints

from msgspec import Meta

from unicl_fast.dataset.manifest import DEFAULT_SHARD_BYTES
from unicl_fast.dataset.object_store import is_url
from unicl_fast.images.limits import (
    MAX_PIXELS,
    MAX_SIDE,
    REENCODE_QUALITY,
    RESIZE_QUALITY,
    ImageFormat,
)
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.system.checked_fields import Count, convert
from unicl_fast.system.installation import install_command

if TYPE_CHECKING:
    from unicl_fast.packing.workers import ImageOptions

Engine = Literal["local", "ray"]
"""The machines that check images: this one, or a cluster's."""
DEFAULT_IMAGE_SECONDS = 30.0  # A hundred times as long as the largest ordinary photograph needs

_FREE_TO_CHANGE = {"restart", "workers", "engine", "progress"}
"""Options that can change when a build resumes: they leave no trace in the data set."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions(ListOptions):
    """The options of a build; the texts below are the help of `unicl-pack build`."""

    seed: Count = 0
    """Decides the order of the samples, shuffled over all sources, and what --split holds out."""
    split: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Make two data sets: OUT/train with this fraction of each class, such as 0.9, and OUT/held-out
    with the rest. Copies of an image, also saved again or mirrored, and images with the same
    --group-column stay together; how many is said. It reads and decodes all images once more."""
    class_names: str = ""
    """Names for the labels: a file with one name a line in label order, or with KEY<TAB>NAME lines
    (KEY is a folder name, say), or the built-in imagenet (keys are WordNet ids such as n01440764).
    By default the labels found become the names, sorted, with blanks for underscores."""
    hierarchy: str = ""
    """A file that says which class is above which, by names or keys: .json with
    {"child": "parent", ...}, .csv or .tsv with names from the top down to a class in each row, or
    lines PARENT CHILD as in WordNet's wordnet.is_a.txt. See docs/objectives.md."""
    hierarchy_columns: Sequence[str] = ()
    """Columns of a .csv or .tsv --hierarchy, from the top down; by default all. The file can be the
    list of images itself."""
    hierarchy_names: str = ""
    """Names for keys in --hierarchy that are no labels: a file with lines KEY<TAB>NAME, such as
    WordNet's words.txt."""
    templates: str = ""
    """Prompts for class names: a file with one a line, {} for the name, or the built-in imagenet
    (80 prompts) or simple (1). By default imagenet if half of the classes are ImageNet's, else
    simple."""
    leave_out: str = ""
    """A CSV file of images to leave out, with the columns source and name, such as inspect's
    --duplicates-list."""
    resize: str = ""
    """short:PIXELS scales images down until their shorter side has this many pixels, and encodes
    them again; smaller ones keep their bytes. 256 is usual for training at 224. square:PIXELS
    scales down or up until the shorter side has this many, and cuts the longer one at both ends."""
    quality: Annotated[int, Meta(ge=1, le=100)] | None = None
    """Quality of encoded JPEG and WebP images, 1 to 100, by default 90. Refused if neither --format
    nor --resize encodes any."""
    format: ImageFormat = "keep"
    """keep: images stay files, and plain JPEGs and PNGs keep their bytes. jpeg, webp, png: all
    become files of that format; plain ones that already are, and need no scaling, keep their
    bytes. raw: decoded for good, 3 bytes a pixel, which makes training's input several times as
    fast for small images (32 pixels a side, say); all must have one size. ppm: decoded too, in
    files of any size. docs/data.md compares them."""
    in_place: bool = False
    """Leave images in the tars and files of SOURCE, in folders or under URLs: they are checked and
    indexed, but not copied. Only files unsafe for training's decoders are converted and kept in
    --out. Sources must not change: see docs/data.md."""
    license: str = ""
    """The license of the data, such as CC-BY-4.0, for the manifest and for cards of models."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    """Largest size of a shard, in bytes."""
    max_pixels: Annotated[int, Meta(ge=1, le=MAX_SIDE**2)] = MAX_PIXELS
    """Images whose headers declare more pixels are left out undecoded. Also limits a worker's
    memory to the need of such an image: 5 GB by default."""
    image_seconds: Annotated[float, Meta(ge=0, le=86_400)] = DEFAULT_IMAGE_SECONDS
    """Images that need longer to read and check, also when tried again, are left out, like images
    that crash a decoder. 0 sets no limit."""
    workers: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Processes that read and check images; 0 starts one for each core, here or of the cluster."""
    engine: Engine = "local"
    """Check images in processes of this machine, or on a Ray cluster (the extra `ray`), whose
    machines must see sources and --out under the same paths. The data set is the same."""
    restart: bool = False
    """Discard an unfinished build in OUT.partial and start over."""

    progress: bool = True
    """Show progress bars. For callers in Python."""

    def repeated(self) -> dict[str, Any]:
        """The options that a build must repeat to resume, by name."""
        return {k: v for k, v in asdict(self).items() if k not in _FREE_TO_CHANGE}

    @property
    def kept_as(self) -> Literal["encoded", "raw", "in place"]:
        """The form in which the data set keeps images, for `DatasetWriter`."""
        if self.in_place:
            return "in place"
        return "raw" if self.format == "raw" else "encoded"

    @property
    def encoding(self) -> str:
        """Format and quality of the images that are re-encoded, in words."""
        quality = RESIZE_QUALITY if self.quality is None else self.quality
        if self.format == "keep":
            scaled = f"JPEG q{quality}, those not scaled q" if self.resize else "JPEG q"
            return f"{scaled}{REENCODE_QUALITY}"
        names = {"jpeg": f"JPEG q{quality}", "webp": f"WebP q{quality}", "png": "PNG", "ppm": "PPM"}
        return names.get(self.format, "pixels")

    def check(self) -> "ImageOptions":
        """Raises ValueError for options that cannot work; returns the workers' options."""
        from unicl_fast.packing.workers import ImageOptions

        for name, kind in get_type_hints(BuildOptions, include_extras=True).items():
            if kind is not str and get_origin(kind) is not Sequence:  # callers give paths, too
                convert(getattr(self, name), kind, name=f"--{name.replace('_', '-')}")
        if self.in_place and (self.resize or self.format != "keep" or is_url(self.image_root)):
            raise ValueError(
                "--in-place leaves images as they are, and reads lists of files in folders only: "
                "leave out --resize, --format and an --image-root under a URL; or --in-place"
            )
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise ValueError(
                f"--engine ray needs Ray, which is not installed: {install_command('ray')}"
            )
        self.conditions()
        if (self.hierarchy_columns or self.hierarchy_names) and not self.hierarchy:
            raise ValueError(
                "--hierarchy-columns and --hierarchy-names say how --hierarchy FILE is read: give "
                "that too"
            )
        self.scores()
        short_side, square_side = self._resized_to()
        return ImageOptions(
            short_side=short_side,
            square_side=square_side,
            quality=self._used_quality(),
            max_pixels=self.max_pixels,
            seconds=self.image_seconds,
            format="packed" if self.in_place else self.format,
            in_place=self.in_place,
        )

    def _resized_to(self) -> tuple[int, int]:
        """`short:256` -> (256, 0), `square:32` -> (0, 32), nothing -> (0, 0)."""
        if not self.resize:
            return 0, 0
        kind, _, number = self.resize.partition(":")
        if (
            kind not in ("short", "square")
            or not (number.isascii() and number.isdecimal())
            or not int(number) >= 1
        ):
            raise ValueError(
                "--resize takes short:PIXELS, such as short:256, or square:PIXELS, such as "
                f"square:32, not {self.resize!r}"
            )
        pixels = int(number)
        if kind == "short":
            return pixels, 0
        if pixels > MAX_SIDE or pixels**2 > self.max_pixels:
            raise ValueError(
                f"--resize {self.resize} would make images of {pixels**2:,} pixels; at most "
                f"{self.max_pixels:,} (--max-pixels) and {MAX_SIDE:,} a side are allowed"
            )
        return 0, pixels

    def _used_quality(self) -> int:
        """The quality of encoded images; raises ValueError for one that would not be used."""
        if self.quality is None:
            return RESIZE_QUALITY
        if self.format in ("png", "ppm", "raw"):
            raise ValueError(
                f"--quality has no meaning with --format {self.format}, which keeps every pixel: "
                "leave it out, or choose --format jpeg or webp"
            )
        if self.format == "keep" and not self.resize:
            raise ValueError(
                "--quality would change nothing: without --resize, --format keep only encodes "
                "files unsafe to decode, at 95; leave it out, or add --resize or --format jpeg or "
                "webp"
            )
        return self.quality
