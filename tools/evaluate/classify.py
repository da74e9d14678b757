"""`unicl-eval classify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .command import Number, Use, require_ending


@dataclass(frozen=True, kw_only=True)
class Classify(Use):
    """Names images by classes that you type, or the run's own; prints a line per image.

    Example: unicl-eval classify --checkpoint runs/first --data photos/ --classes cat dog
    """

    classes: tuple[str, ...] = ()
    """Two or more class names in words, or one file with a name per line; by default the classes
    that the run was trained on."""
    templates: str = "simple"
    """Prompt templates: a file with one per line, imagenet, simple, or clip-benchmark:KEY."""
    top: Number = 3
    """Classes for each image, the most probable first."""
    out: Path | None = None
    """File for the answers: .jsonl, with a line per image; by default they are printed."""

    def check(self) -> None:
        super().check()
        if self.out is not None:
            require_ending(self.out, ".jsonl")

    def run(self) -> None:
        from unicl_fast.evaluation.data import all_descriptions
        from unicl_fast.system.atomic_files import write_text_atomically
        from unicl_fast.system.wording import count_of, print_text
        from unicl_fast.text.class_lists import read_class_names, read_templates

        one_file = len(self.classes) == 1
        names: Sequence[str] = self.classes or self.own_classes()
        if one_file:
            names = read_class_names(self.classes[0])
        if not names:
            raise ValueError("this model names no classes: give them by --classes")
        templates = read_templates(self.templates)
        with self.encoded("projection", names=names) as (model, dataset, features):
            if features is None:
                return
            found = model.rank_classes(features, names, templates=templates, top=self.top)
            answers = list(zip(all_descriptions(dataset), found, strict=True))
        if self.out is None:
            for image, answer in answers:
                classes = ", ".join(f"{name} {value:.1%}" for name, value in answer.items())
                print_text(f"{image.name}: {classes}\n", sys.stdout)
            return
        lines = (
            json.dumps({"source": image.source, "name": image.name, "classes": answer}) + "\n"
            for image, answer in answers
        )
        write_text_atomically(self.out, "".join(lines))
        print(f"{self.out}: {count_of(len(found), 'image')}")
