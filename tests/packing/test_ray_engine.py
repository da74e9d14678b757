"""`unicl-pack build --engine ray`: the bytes of a local build, also when Ray's processes die."""

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

import pytest
from bad_entries import Crashing, Faulty, KillsParentOnce
from pack_runs import build_set, jpeg

from unicl_fast.packing import ray_engine
from unicl_fast.packing.ray_engine import check_on_ray
from unicl_fast.packing.sources.entries import FileEntry, Problem
from unicl_fast.packing.workers import Checked, ImageOptions, Task
from unicl_fast.system.installation import install_command

has_ray = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not has_ray, reason="Ray is not installed: pip install -e '.[ray]'")
OPTIONS = ImageOptions(short_side=0, quality=90, max_pixels=10**6, seconds=60)


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
    results = check_on_ray(tasks, options=OPTIONS, workers=workers)
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
    results = check_on_ray(tasks, options=OPTIONS, workers=1)
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
    results = list(check_on_ray(tasks, options=OPTIONS, workers=2))
    assert os.path.exists(tmp_path / "mark"), "no process of Ray was killed"
    problems = {n: result for n, result in enumerate(results) if isinstance(result, Problem)}
    assert {n: problem.kind for n, problem in problems.items()} == {70: "crash", 150: "failed"}
    checked = [result for result in results if isinstance(result, Checked)]
    assert len(checked) == 198
    assert {result.data for result in checked} == {jpeg(3)}
