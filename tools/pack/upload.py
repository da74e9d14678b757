"""`unicl-pack upload`: reads the arguments; the work is `unicl_fast.packing.build.upload`'s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unicl_fast.packing.upload import upload_dataset


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Copy a packed data set to a URL, such as s3://bucket/packed/photos.

    Each file is read back and compared with its checksum; the manifest is written last, so that the
    data set appears when it is whole. Given again, an upload that was cut off goes on where it was.

    Exit code: 0 done, 2 not done; what was uploaded stays.

    Example:
      unicl-pack upload packed/photos --out s3://bucket/packed/photos
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The data set."""
    out: str
    """URL to make. Nothing else may lie there."""

    def run(self) -> tuple[str, int]:
        """What there is to say at the end, and the exit code."""
        return upload_dataset(self.folder, self.out), 0
