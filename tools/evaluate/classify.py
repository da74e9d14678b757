"""`unicl-eval classify`."""

import json
import sys
from collections.abc import Mapping, Sequence
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
    """Classes for each image, the most probable first; of several label columns for each."""
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

        columns: Mapping[str, Sequence[str]] = {"": self.classes} if self.classes else {}
        if len(self.classes) == 1:
            columns = {"": read_class_names(self.classes[0])}
        if not (columns := columns or self.own_classes()):
            raise ValueError("this model names no classes: give them by --classes")
        templates = read_templates(self.templates)
        with self.encoded("projection", columns=columns) as (model, dataset, features):
            if features is None:
                return
            found = [
                model.rank_classes(features, names, templates=templates, top=self.top)
                for names in columns.values()
            ]
            images = all_descriptions(dataset)
        lines = []
        for image, *answers in zip(images, *found, strict=True):
            if self.out is None:
                texts = (
                    f"{column} ".lstrip()
                    + ", ".join(f"{name} {p:.1%}" for name, p in answer.items())
                    for column, answer in zip(columns, answers, strict=True)
                )
                print_text(f"{image.name}: {'; '.join(texts)}", sys.stdout)
            named = dict(zip(columns, answers, strict=True))
            classes = {"classes": named[""]} if list(named) == [""] else {"columns": named}
            lines.append(json.dumps({"source": image.source, "name": image.name} | classes) + "\n")
        if self.out is not None:
            write_text_atomically(self.out, "".join(lines))
            print(f"{self.out}: {count_of(len(lines), 'image')}")
