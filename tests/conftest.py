"""Fixtures that every room's tests share."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import multiprocessing
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

# Before torch is imported, here and in the programs that tests start: their tensors are too small
# for two threads, which on a busy machine wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Or each run compiles all tests anew, and each program that they start the library.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jaxtyping
import property_tests  # noqa: F401  # hypothesis' profiles, before its plugin takes one
import pytest

import unicl_fast
from unicl_fast.system import bar, line
from unicl_fast.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from interpreted_kernels import Compute

sys.dont_write_bytecode = False
gc.disable()  # while millions of objects are imported, which stay
_CHECKOUT = Path(__file__).resolve().parents[1]
_ALL_SLOW = re.compile(r"^pytestmark = \[?[^\]\n]*(?<=pytest\.mark\.)(slow|long)\b", re.MULTILINE)


def _modules_with_shapes() -> list[str]:
    """Import names of the library's files that annotate tensors with their shapes."""
    library = Path(unicl_fast.__file__).parent
    return [
        ".".join(["unicl_fast", *path.relative_to(library).with_suffix("").parts])
        for path in library.rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]


# Before any of them is imported: shapes in annotations are checked at every call.
jaxtyping.install_import_hook(_modules_with_shapes(), "shape_checks.check_types")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # of xdist, whose exit code nobody reads
        # Behind all that is registered later: to take millions of objects apart costs 5 CPU s.
        atexit.register(os._exit, 0)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files with only slow tests are not imported: each process would pay for each import."""
    if collection_path.suffix != ".py" or "not slow" not in config.option.markexpr:
        return None
    return _ALL_SLOW.search(collection_path.read_text(encoding="utf-8")) is not None or None


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("long"):
        item.add_marker("slow")


def pytest_collection_finish() -> None:
    """From here on the collector looks at what tests make, and not at what was imported."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # or libraries that look for leaks at the end find some
    gc.freeze = gc.unfreeze = lambda: None  # packing's, or a build would undo it


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """For tests of the errors that users get, who have no such checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and captions; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("UNICL_TEST_DATA", _CHECKOUT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no test data at {folder}; set UNICL_TEST_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def images(shared_data: Path) -> torch.Tensor:
    """Twelve photographs, uint8 [12 32 32 3]."""
    from small_runs import real_images

    return real_images(shared_data, 12)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton kernels are interpreted."""
    from interpreted_kernels import set_up_interpreter, skip_with_old_triton

    skip_with_old_triton()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=set_up_interpreter) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # the process begins here
        yield pool


@pytest.fixture(scope="module", params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def compute(request: pytest.FixtureRequest) -> Compute:
    """Calls functions of `interpreted_kernels` where Triton's kernels run."""
    from interpreted_kernels import call_on

    if request.param == "gpu":
        return functools.partial(call_on, "cuda")
    pool = request.getfixturevalue("interpreter")
    return lambda *call, **options: pool.submit(*call, **options).result()


@pytest.fixture(scope="session")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 images as class folders and packed, and captioned photographs packed."""
    from program_runs import call

    from unicl_fast.tools.pack import __main__ as pack

    folder = tmp_path_factory.mktemp("data")
    archive = zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip")
    names = [name for name in archive.namelist() if name.endswith(("0001.jpg", "0002.jpg"))]
    names += [name for name in archive.namelist() if name.endswith("cat/0003.jpg")]
    for name in names:
        archive.extract(name, folder / "classes")
    lines = (shared_data / "captions" / "flickr8k" / "captions.jsonl").read_text().splitlines()
    (folder / "list.jsonl").write_text("\n".join(lines[:20]))
    call(pack, "build", folder / "classes", "--out", folder / "labels")
    call(
        *(pack, "build", folder / "list.jsonl", "--out", folder / "captions"),
        *("--image-root", shared_data / "captions" / "flickr8k"),
    )
    return folder


@pytest.fixture(scope="session", autouse=True)
def _vocabulary_is_read_once() -> Tokenizer:
    """All tokenizers share the encoding of one that lives: reading it takes a tenth of a second."""
    tokenizer = Tokenizer()
    tokenizer.encode([""])
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def _work_of_others_is_done_once() -> Iterator[None]:
    """Those of tyro and timm for each program and model: each was a tenth of all CPU time.

    The names are private, so other versions may lack them, and are then only slower.
    """
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError, AttributeError):
            _patch(patch)
        yield


def _patch(patch: pytest.MonkeyPatch) -> None:
    if "tyro" in sys.modules:
        from tyro import _docstrings, _unsafe_cache

        # if pytest is imported, a tenth of what is cached is computed again, at random
        patch.setattr(_unsafe_cache, "sys", SimpleNamespace(modules={}))
        tokens = _docstrings._ClassTokenization
        patch.setattr(tokens, "make", staticmethod(functools.cache(tokens.make)))
    if "timm" in sys.modules:
        from timm.layers import weight_init

        draw = weight_init._trunc_normal_
        patch.setattr(
            weight_init,
            "_trunc_normal_",  # by ten functions, of tensors that have no content, too
            lambda tensor, *how: tensor if tensor.is_meta else draw(tensor, *how),
        )


@pytest.fixture(autouse=True)
def _work_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine any work may take the seconds after which bars and lines appear."""
    for shown, name in ((bar, "_SOON"), (bar, "_LOG_SECONDS"), (line, "_SOON")):
        monkeypatch.setattr(shown, name, 3600.0)


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    """Programs that a test has started end with it."""
    yield
    if "program_runs" in sys.modules:
        from program_runs import STARTED

        while STARTED:
            process = STARTED.pop()
            process.kill()  # its ranks end with it
            process.wait()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Graphs and counts of torch.compile as in a new process."""
    import torch
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
