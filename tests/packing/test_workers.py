"""An image that crashes, hangs or devours memory costs a build itself and nothing else."""

import functools
import importlib.util
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from bad_entries import Crashing, CrashingOnce, Faulty, Hanging, Hungry, KillsParentOnce, Refused
from pack_runs import build_set, jpeg, left_out, write_photos

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import MADE_OF_NAME
from unicl_fast.packing import build as build_module
from unicl_fast.packing import ray_engine
from unicl_fast.packing.ray_engine import check_on_ray
from unicl_fast.packing.sources.entries import Entry, FileEntry, Problem
from unicl_fast.packing.workers import Checked, ImageOptions, Task, check_in_order
from unicl_fast.system.installation import install_command

# expected of each: what stands in quarantine.csv
BAD: dict[str, tuple[Entry, str, str]] = {
    "dog/fault.jpg": (Crashing(int(signal.SIGSEGV)), "crash", "a decoder crashed (SIGSEGV)"),
    "cat/abort.jpg": (Crashing(int(signal.SIGABRT)), "crash", "a decoder crashed (SIGABRT)"),
    "cat/killed.jpg": (Crashing(int(signal.SIGKILL)), "crash", "a decoder was killed, possibly "
                       "out of memory"),
    "cat/slow.jpg": (Hanging(), "too slow", "not done after 3 seconds"),
    "dog/hungry.jpg": (Hungry(16), "too large", "uses more memory than its number of pixels "
                       "should"),
    "dog/odd.jpg": (Faulty(), "failed", "KeyError: 'surprise'"),
}  # fmt: skip


def options(**changes: float) -> ImageOptions:
    known = {"short_side": 0, "quality": 90, "max_pixels": 10_000_000, "seconds": 600}
    return ImageOptions(**(known | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 sound images, and the names of those that will turn bad."""
    root = write_photos(tmp_path_factory.mktemp("images"), range(70), ("cat", "dog"))
    for name in BAD:
        (root / name).touch()
    return root


def build(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    out: Path,
    entries: dict[str, Entry],
    workers: int,
) -> dict[str, bytes]:
    """Packs `folder` with other entries under some names; returns the files made."""

    def task(name: str, entry: Entry, *others: object) -> Task:
        return Task(name, entries.get(name, entry), *others)

    monkeypatch.setattr(build_module, "Task", task)
    build_set([folder], out, workers=workers, image_seconds=3)
    monkeypatch.undo()
    (out / MADE_OF_NAME).unlink()  # which knows the entries, and is no part of the data set
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.slow
def test_what_ends_a_worker_is_left_out_and_all_else_is_as_if_it_were_damaged(
    monkeypatch, folder, tmp_path
):
    bad = {name: entry for name, (entry, _, _) in BAD.items()}
    refused: dict[str, Entry] = {
        name: Refused(kind, message) for name, (_, kind, message) in BAD.items()
    }
    found = build(monkeypatch, folder, tmp_path / "bad", bad, 3)
    assert found == build(monkeypatch, folder, tmp_path / "refused", refused, 1)
    expected = {name: (kind, message) for name, (_, kind, message) in BAD.items()}
    assert left_out(tmp_path / "bad") == expected
    with PackedDataset(tmp_path / "bad") as dataset:
        assert len(dataset) == 70
        images = {dataset.image_bytes(index, verify=True).tobytes() for index in range(70)}
    assert images == {jpeg(number) for number in range(70)}


def test_a_death_that_was_not_the_images_fault_costs_nothing(tmp_path):
    """A signal from outside, a neighbour's leak: the second try in a fresh process is sound."""
    tasks = [
        Task(str(number), CrashingOnce(str(tmp_path / str(number)), jpeg(number)), ("a dog",))
        for number in range(3)
    ]
    results = list(check_in_order(tasks, options=options(), workers=1))
    for number, result in enumerate(results):
        assert isinstance(result, Checked)
        assert result.data == jpeg(number)
        assert [len(ids) for ids in result.tokens] == [2 * 4]


def test_workers_are_gone_when_the_results_are_not_wanted_any_more():
    others = set(psutil.Process().children())  # which fixtures of a session have started
    sound = [Task(name="a", entry=CrashingOnce("/", jpeg(1)))] * 128
    stuck = [Task(name="b", entry=Hanging())] * 400
    results = check_in_order(sound + stuck, options=options(seconds=0), workers=2)
    assert isinstance(next(iter(results)), Checked)
    assert len(set(psutil.Process().children()) - others) == 2
    results.close()
    assert not set(psutil.Process().children()) - others


# On Ray: the bytes of a local build, also when Ray's processes die.

has_ray = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not has_ray, reason="Ray is not installed: pip install -e '.[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, with two workers, which can import what tests define."""
    import ray

    oracles = str(Path(__file__).resolve().parents[1] / "helpers")
    environment = {"env_vars": {"PYTHONPATH": oracles}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


def test_a_build_on_ray_without_ray_says_what_to_install(tmp_path, pack, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ("build", tmp_path, "--out", tmp_path / "o", "--engine", "ray")
    assert install_command("ray") in pack(*words, code=2)


class InOneProcess:
    """Stands for Ray: tasks run when their results are asked for, and are counted until then."""

    exceptions = SimpleNamespace(RayError=ArithmeticError)

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._under_way = self.most = 0

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self._cores}

    def remote(self, **_: Any) -> Callable[..., Any]:
        return lambda function: SimpleNamespace(remote=functools.partial(self._submit, function))

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> SimpleNamespace:
        self._under_way += 1
        self.most = max(self.most, self._under_way)

        def result() -> Any:
            self._under_way -= 1
            return function(*arguments)

        return SimpleNamespace(future=lambda: SimpleNamespace(result=result))


@pytest.mark.parametrize(("workers", "most"), [(1, 1), (3, 3), (0, 2 * 3)])
def test_no_more_chunks_are_under_way_than_there_are_workers(monkeypatch, workers, most):
    """Ray runs as many as it has cores, whatever this machine's share is to be."""

    def check(tasks: list[Task], *_: Any) -> tuple[str, list[Problem]]:
        return "m1", [Problem(kind="damaged", message=task.name) for task in tasks]

    ray = InOneProcess(cores=2)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_engine, "_check_chunk", check)
    tasks = [Task(name=str(number), entry=Faulty()) for number in range(64 * 20)]
    results = check_on_ray(tasks, options=options(), workers=workers)
    assert [result.message for result in results] == [task.name for task in tasks]
    assert ray.most == most


def test_what_one_machine_alone_could_not_read_is_no_problem_of_the_image(tmp_path, monkeypatch):
    def check(tasks: list[Task], *_: Any) -> tuple[str, list[Problem]]:
        seen.extend(task.entry for task in tasks)
        return "m1", [Problem(kind="unreadable", message="No such file") for _ in tasks]

    seen: list[Any] = []
    monkeypatch.setitem(sys.modules, "ray", InOneProcess(cores=2))
    monkeypatch.setattr(ray_engine, "_check_chunk", check)
    monkeypatch.chdir(tmp_path)
    Path("1.jpg").write_bytes(jpeg(1))
    tasks = [Task(name=name, entry=FileEntry(name, 1)) for name in ("gone.jpg", "1.jpg")]
    results = check_on_ray(tasks, options=options(), workers=1)
    assert next(results) == Problem(kind="unreadable", message="No such file")
    with pytest.raises(
        RuntimeError,
        match=rf"1\.jpg: m1 could not read {tmp_path}/1\.jpg \(No such file\), and "
        rf"{platform.node()}, which .* must see the sources and --out",
    ):
        next(results)
    assert seen == [FileEntry(f"{tmp_path}/{name}", 1) for name in ("gone.jpg", "1.jpg")]


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_cluster_gives_the_bytes_of_this_machine(shared_data, tmp_path):
    source = shared_data / "captions" / "flickr8k" / "captions.jsonl"
    for engine in ("local", "ray"):
        options = {"engine": engine, "resize": "short:96", "shard_bytes": 500_000, "workers": 2}
        build_set([source], tmp_path / engine, **options)
    local, on_ray = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("local", "ray")
    )
    assert local == on_ray
    assert len(local) > 10


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_bad_images_and_killed_processes_of_ray_cost_no_others(tmp_path):
    sound = KillsParentOnce(str(tmp_path / "mark"), jpeg(3))
    tasks = [Task(name=str(number), entry=sound, captions=("a cat",)) for number in range(200)]
    tasks[70] = Task(name="crash", entry=Crashing(signal.SIGSEGV))
    tasks[150] = Task(name="fault", entry=Faulty())
    results = list(check_on_ray(tasks, options=options(), workers=2))
    assert os.path.exists(tmp_path / "mark"), "no process of Ray was killed"
    problems = {n: result for n, result in enumerate(results) if isinstance(result, Problem)}
    assert {n: problem.kind for n, problem in problems.items()} == {70: "crash", 150: "failed"}
    checked = [result for result in results if isinstance(result, Checked)]
    assert len(checked) == 198
    assert {result.data for result in checked} == {jpeg(3)}
