"""Class names and prompt templates, from files and installed packages.

ImageNet's names and templates are open_clip's, its wnids timm's; lists of CLIP's other evaluation
data sets come from the package clip-benchmark, if installed.
"""

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from unicl_fast.system.installation import install_command
from unicl_fast.system.untrusted_files import read_text

SIMPLE_TEMPLATES = ("a photo of a {}.",)
"""One template for photographed things, if variety is not wanted."""

CLIP_BENCHMARK = "clip-benchmark:"
"""Prefix of a list of the package clip-benchmark, before the data set's key."""
_ListName = Literal["class names", "templates"]
_CLIP_BENCHMARK_FILES: dict[_ListName, str] = {
    "class names": "en_classnames.json",
    "templates": "en_zeroshot_classification_templates.json",
}


def imagenet_class_names() -> tuple[str, ...]:
    """CLIP's 1,000 names of ImageNet-1K, in order of `imagenet_wnids`."""
    return tuple(_open_clip_metadata().IMAGENET_CLASSNAMES)


def imagenet_templates() -> tuple[str, ...]:
    """CLIP's 80 templates for ImageNet, each with one "{}"."""
    templates = tuple(fill("{}") for fill in _open_clip_metadata().OPENAI_IMAGENET_TEMPLATES)
    return check_templates(templates, origin="open_clip's ImageNet templates")


def templates_for(class_names: Sequence[str]) -> tuple[str, ...]:
    """ImageNet's templates (sculpture, origami, ...) if half of the names are its, else one."""
    known = set(map(_plain, imagenet_class_names()))
    num_known = sum(_plain(name) in known for name in class_names)
    return imagenet_templates() if 2 * num_known >= len(class_names) else SIMPLE_TEMPLATES


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def imagenet_wnids() -> tuple[str, ...]:
    """WordNet ids of ImageNet-1K, sorted as its labels are."""
    from timm.data.imagenet_info import ImageNetInfo  # here, because timm loads torch

    info: Any = ImageNetInfo()
    return tuple(info.label_names())


def read_class_names(source: str | Path) -> tuple[str, ...]:
    """Class names from a file, the built-in "imagenet", or "clip-benchmark:KEY".

    A file is UTF-8 text with one name a line, label 0 first. An empty line between names would
    shift the labels (ValueError). Raises FileNotFoundError or ModuleNotFoundError if it is missing.
    """
    if str(source) == "imagenet":
        return imagenet_class_names()
    return _read_list(str(source), "class names", built_in="imagenet")


def read_templates(source: str | Path) -> tuple[str, ...]:
    """Prompt templates from a file, "imagenet" (80), "simple" (1), or "clip-benchmark:KEY".

    A file is UTF-8 text with one template a line, each with exactly one "{}" for the class name.
    """
    if str(source) == "imagenet":
        return imagenet_templates()
    if str(source) == "simple":
        return SIMPLE_TEMPLATES
    found = _read_list(str(source), "templates", built_in="imagenet, simple")
    if str(source).startswith(CLIP_BENCHMARK):
        found = tuple(line.replace("{c}", "{}") for line in found)
    return check_templates(found, origin=str(source))


def fill_template(template: str, class_name: str) -> str:
    """The prompt for one class; braces in the class name stay."""
    return template.replace("{}", class_name)


def check_templates(templates: tuple[str, ...], *, origin: str) -> tuple[str, ...]:
    """Returns the templates, or raises ValueError, naming `origin`, if they are unusable."""
    if not templates:
        raise ValueError(f"{origin}: class names need at least one template, and there is none")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f'{origin}: a template needs exactly one "{{}}" for the class name, '
                f"this one has {template.count('{}')}: {template!r}"
            )
    return templates


def _read_list(source: str, what: _ListName, *, built_in: str) -> tuple[str, ...]:
    """A list of clip-benchmark, or a file's stripped lines."""
    if source.startswith(CLIP_BENCHMARK):
        return _clip_benchmark_list(what, source.removeprefix(CLIP_BENCHMARK))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file of {what} at {path}; give a text file with one a line, "
            f"or one of the built-in lists: {built_in}, {CLIP_BENCHMARK}DATA_SET"
        )
    lines = read_text(path).rstrip().splitlines()
    if not lines:
        raise ValueError(f"{path} holds no {what}; it needs one a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{path}: line {number} is empty; {what} are numbered by their line")
    return tuple(line.strip() for line in lines)


def _clip_benchmark_list(what: _ListName, key: str) -> tuple[str, ...]:
    """A list for a data set such as cifar10, from the package's file: importing it is slow."""
    path = installed_file(
        "clip_benchmark",
        f"datasets/{_CLIP_BENCHMARK_FILES[what]}",
        missing="names that begin with clip-benchmark: come from the package clip-benchmark; "
        f"install it with: {install_command('evaluation')}",
    )
    lists: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    if key not in lists:
        raise ValueError(
            f"clip-benchmark has no {what} for {key!r}; it has them for {', '.join(sorted(lists))}"
        )
    return tuple(lists[key])


@functools.cache
def _open_clip_metadata() -> ModuleType:
    """open_clip's names and templates, without importing the package, which loads torch."""
    path = installed_file(
        "open_clip",
        "zero_shot_metadata.py",
        missing="ImageNet's names and templates come from the package open_clip_torch; "
        "install it with: pip install open_clip_torch",
    )
    spec = importlib.util.spec_from_file_location("_open_clip_zero_shot_metadata", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed_file(package: str, name: str, *, missing: str) -> Path:
    """A file of an installed package, without importing it; ModuleNotFoundError says `missing`."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(missing)
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing from the installed {package}; reinstall that package"
        )
    return path
