"""Measures the structure of the code, for tests that hold it to rules and limits.

`python tests/helpers/trunk_table.py` prints a table.
"""

import ast
import dataclasses
import functools
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx

CHECKOUT = Path(__file__).resolve().parents[2]
PRODUCT = ("unicl_fast", "pipelines", "tools", "benchmarks", "examples")
# The parts whose size docs/scope.md limits, in its order.
SIZES = {
    "installed": ("unicl_fast", "pipelines", "tools"),
    "benchmarks": ("benchmarks",),
    "tests": ("tests",),
}
# What every batch passes, from the plan to the update.
TRUNK = (
    "unicl_fast/batch.py",
    "unicl_fast/models/unicl.py",
    "unicl_fast/training/encoding.py",
    "unicl_fast/training/micro_batches.py",
    "unicl_fast/training/parallel.py",
    "unicl_fast/training/step.py",
    "unicl_fast/training/trainer.py",
    "unicl_fast/training/observers.py",
    "unicl_fast/training/assembly.py",
    "unicl_fast/training/run.py",
    "unicl_fast/training/settle.py",
    "unicl_fast/training/data.py",
    "unicl_fast/training/metrics.py",
    "unicl_fast/checkpoints/load.py",
    "unicl_fast/checkpoints/state.py",
    "unicl_fast/checkpoints/writer.py",
    "unicl_fast/objectives/objective.py",
    "unicl_fast/objectives/text_columns.py",
    "unicl_fast/training/build.py",
    "pipelines/plan/plan.py",
    "pipelines/steps.py",
    "pipelines/texts.py",
    "pipelines/read/samples.py",
    "pipelines/read/bad_samples.py",
    "pipelines/host_batches.py",
    "pipelines/graph.py",
    "pipelines/running.py",
    "pipelines/train_loader.py",
)
BUILT_IN = ("unicl", "clip", "sigmoid", "siglip", "ce")
# Objectives and augmentations by the names that code would have for them: the trunk has none.
FEATURES = re.compile(
    r"sigmoid|siglip|cross_entropy|class_rows|logit_bias|mixup|cutmix|distil|reinforce|"
    r"ancestor|balance|lora|dora|peft|(?<!\.)\bclip\b(?!_)|\"ce\"|=ce\b",
    re.IGNORECASE,
)
# Features that the trunk knows, by the names that it has for them.
KNOWN = {
    "stages": re.compile(r"stage|\bspans?\b|span_at", re.IGNORECASE),
    "levels": re.compile(r"\blevels?\b|_levels\b|\bchains?\b|hierarch"),
    "several labels": re.compile(
        r"several|all_labels|image_classes|Membership|ImageLabels|gather_labels|_count_positives"
    ),
    "stored features": re.compile(r"image_features|[Ff]eature_?[Ff]ile|FeatureLoader|stored_feat"),
}


# What there is one of, and the code that would be in a file with another.
ONES = {
    "load_model": r"^def load_model\(",
    "bars": r"^from tqdm import",
    "runners of risky children": r"RLIMIT_DATA, \(",
    "tables of bottlenecks": r"^LIMITS\b",
    "writers of rows of CSV lists": r"csv\.writer\(",
}


def files_of(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def code_of(path: Path) -> str:
    """The code of a file without docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                one
                for one in body
                if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.unparse(tree)


def naming(words: re.Pattern[str]) -> list[str]:
    """Lines of the trunk's code that have such a word."""
    return [
        f"{path}: {line.strip()}"
        for path in TRUNK
        for line in code_of(CHECKOUT / path).splitlines()
        if words.search(line)
    ]


def known_features() -> dict[str, int]:
    """Lines of the trunk that name each of the features that it knows."""
    return {name: len(naming(words)) for name, words in KNOWN.items()}


def sizes_in_scope() -> dict[str, int]:
    """The most lines of each part, as docs/scope.md states them."""
    page = (CHECKOUT / "docs" / "scope.md").read_text(encoding="utf-8").partition("## Size")[2]
    numbers = [int(one.replace(",", "")) for one in re.findall(r"\*\*(\d[\d,]*)", page)]
    return dict(zip(SIZES, numbers, strict=True))


def lines_of(part: str) -> int:
    """Lines of Python in a part of the checkout."""
    files = files_of(*SIZES[part])
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def long_functions(limit: int = 80) -> list[str]:
    """Functions of `limit` lines and more."""
    return [
        f"{path.relative_to(CHECKOUT)}: {node.name} has {length} lines"
        for path in files_of(*PRODUCT)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) >= limit
    ]


def trainer_init() -> tuple[int, int]:
    """Lines and arguments of `Trainer.__init__`, without the docstring and `self`."""
    tree = tree_of(CHECKOUT / "unicl_fast/training/trainer.py")
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = [node for node in classes["Trainer"].body if isinstance(node, ast.FunctionDef)]
    init = next(node for node in functions if node.name == "__init__")
    arguments = len(init.args.args) + len(init.args.kwonlyargs) - 1
    return (init.end_lineno or 0) - init.body[1].lineno + 1, arguments


def module_of(path: Path) -> str:
    """The import name of a file, as an install has it."""
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    parts = parts if parts[0] == "unicl_fast" else ("unicl_fast", *parts)
    return ".".join(parts).removesuffix(".__init__")


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """Full names of what a file imports, wherever in the file."""
    found: set[str] = set()
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            # the package itself imports lazily what it offers
            found |= names if module == "unicl_fast" else {module} | names
    return frozenset(found)


@functools.cache
def graph_of_imports() -> nx.DiGraph:
    """The modules of the product, each with an arrow to those of them that it imports."""
    files = {module_of(path): path for path in files_of(*PRODUCT)}
    del files["unicl_fast"]
    own = {name: imports_of(path) & files.keys() - {name} for name, path in files.items()}
    return nx.DiGraph(own)


def knowing_the_config() -> list[Path]:
    """Files that import the whole config of a run, not the groups that they need."""
    files = files_of(*SIZES["installed"])
    return [path for path in files if "unicl_fast.config.TrainConfig" in imports_of(path)]


def options() -> dict[str, list[str]]:
    """The options of a run by group; those of another objective are tested with it."""
    from unicl_fast.config import TrainConfig
    from unicl_fast.objectives.registry import make_objective

    groups = {}
    for group in dataclasses.fields(TrainConfig):
        values = [getattr(TrainConfig(), group.name)]
        if group.name == "objective":
            values = [make_objective(name) for name in BUILT_IN]
        names = [field.name for value in values for field in dataclasses.fields(value)]
        groups[group.name] = list(dict.fromkeys(names))
    return groups


def iterators_of_a_batch() -> int:
    """Iterators that a batch passes between shard and step, of a run without stages on a CPU.

    Generators are counted as they run, while the images of a batch are read. Three of itertools and
    builtins, which have no frames, are added: `map`, `starmap` and the trainer's `islice`.
    """
    from packed_sets import Sample, pack, saved
    from PIL import Image

    from unicl_fast.config import DataConfig, RunConfig, TrainConfig
    from unicl_fast.pipelines.read.samples import SampleReader
    from unicl_fast.pipelines.train_loader import TrainLoader
    from unicl_fast.text.prompts import ClassPrompts
    from unicl_fast.text.tokenizer import Tokenizer

    counts, read, names = [], SampleReader.read_files, ["cat", "dog"]

    def reading(self: SampleReader, batches: Any) -> Any:
        found, frames = set(), list(sys._current_frames().values())
        while frames:
            frame = frames.pop()
            frames += [frame.f_back] if frame.f_back else []
            of_ours = Path(frame.f_code.co_filename).is_relative_to(CHECKOUT / "pipelines")
            if of_ours and frame.f_code.co_flags & inspect.CO_GENERATOR:
                found.add(frame.f_code.co_qualname)
        counts.append(len(found))
        return read(self, batches)

    SampleReader.read_files = reading
    try:
        with tempfile.TemporaryDirectory() as folder:
            image = saved(Image.new("RGB", (300, 300), "teal"), format="JPEG")
            samples = [Sample(image, labels=[number % 2]) for number in range(8)]
            options = {"class_names": names, "tokenizer": Tokenizer()}
            with pack(Path(folder) / "set", samples, **options) as dataset:
                config = TrainConfig(data=DataConfig(threads=1), run=RunConfig(global_batch_size=4))
                prompts = ClassPrompts([(names, dataset.manifest.templates)], Tokenizer())
                loader = TrainLoader(config, [dataset], None, prompts)
                batches = loader.batches(0)
                for _ in range(3):
                    next(batches)
                loader.close()
    finally:
        SampleReader.read_files = read
    return max(counts) + 3


def rows() -> Iterator[tuple[str, object, str]]:
    """Each check, what is found, and the goal."""
    lines, arguments = trainer_init()
    graph = graph_of_imports()
    circles = [one for one in nx.strongly_connected_components(graph) if len(one) > 1]
    pages = [*CHECKOUT.glob("docs/*.md"), CHECKOUT / "README.md"]
    yield "lines of the trunk that name an objective", len(naming(FEATURES)), "0"
    known = known_features()
    count = sum(known.values()) - known["stages"]
    yield "... levels, several labels, stored features", count, "<= 110"
    yield "... stages", known["stages"], ""
    yield "functions of 80 lines and more", len(long_functions(80)), "0"
    yield "Trainer.__init__: lines, arguments", f"{lines}, {arguments}", "<= 40, <= 7"
    yield "imports of trainer.py", len(graph["unicl_fast.training.trainer"]), "<= 18"
    yield "files that import TrainConfig", len(knowing_the_config()), "<= 21"
    yield "circles of imports", len(circles), "0"
    yield "options of a run", sum(map(len, options().values())), "<= 85"
    for name, code in ONES.items():
        files = files_of(*SIZES["installed"])
        found = [one for one in files if re.search(code, one.read_text("utf-8"), re.MULTILINE)]
        yield name, len(found), "1"
    yield "iterators between shard and step", iterators_of_a_batch(), "<= 6"
    for part, most in sizes_in_scope().items():
        yield f"lines of Python, {part}", lines_of(part), f"<= {most:,}"
    words = sum(len(path.read_text(encoding="utf-8").split()) for path in pages)
    yield "words of docs and README", words, "<= 32,000"


if __name__ == "__main__":
    for check, found, goal in rows():
        print(f"{check:44}{found!s:>10}  {goal}")
