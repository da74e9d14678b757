"""Limits and formats of images that options name: programs parse those before they import numpy."""

from typing import Literal

MAX_PIXELS = 89_478_485
"""Largest image accepted by default, checked before allocating memory: a quarter GiB as RGB, and
Pillow's limit for decompression bombs."""
MAX_SIDE = 65_500  # libjpeg's limit for a side
REENCODE_QUALITY = 95
RESIZE_QUALITY = 90
DEFAULT_DISTANCE = 4
"""Bits of 64 in which perceptual hashes of copies may differ: includes copies in another size,
quality, aspect or in grey, and none of 200,000 pairs of unrelated photographs (docs/data.md)."""
MAX_DISTANCE = 12  # beyond this, unrelated images are near each other, and the search is slow

ImageFormat = Literal["keep", "jpeg", "webp", "png", "ppm", "raw"]
"""The form of a sound image: its bytes are kept (or encoded anew as JPEG if needed), it becomes a
file of that format, or it is stored decoded."""
