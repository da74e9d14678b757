"""`unicl-pack build --engine ray`: the bytes of a local build, also when Ray's processes die."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_entries import Crashing, Faulty, KillsParentOnce
from pack_runs import jpeg, run_pack

from unicl_fast.tools.build_dataset import build_dataset
from unicl_fast.tools.items import Problem
from unicl_fast.tools.picture_worker import Checked, PictureOptions, Task
from unicl_fast.tools.ray_engine import check_on_ray

has_ray = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not has_ray, reason="Ray is not installed: pip install -e '.[ray]'")
OPTIONS = PictureOptions(short_side=0, quality=90, max_pixels=10**6, seconds=5)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, with two workers, which can import what tests define."""
    import ray

    oracles = str(Path(__file__).resolve().parents[1] / "oracles")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": oracles}},
    )
    yield
    ray.shutdown()


def test_a_build_on_ray_without_ray_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, text = run_pack(
        "build", tmp_path, "--out", tmp_path / "o", "--engine", "ray", capsys=capsys
    )
    assert code == 2
    assert "pip install 'unicl_fast[ray]'" in text


@needs_ray
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("cluster")
def test_a_cluster_gives_the_bytes_of_this_machine(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "captions" / "flickr8k" / "captions.jsonl"
    for engine in ("local", "ray"):
        build_dataset(
            [source],
            tmp_path / engine,
            engine=engine,  # type: ignore[arg-type]
            resize="short:96",
            shard_bytes=500_000,
            workers=2,
            progress=False,
        )
    local, on_ray = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("local", "ray")
    )
    assert local == on_ray
    assert len(local) > 10


@needs_ray
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("cluster")
def test_bad_pictures_and_killed_processes_of_ray_cost_no_others(tmp_path: Path) -> None:
    sound = KillsParentOnce(str(tmp_path / "mark"), jpeg(3))
    tasks = [Task(name=str(number), entry=sound, captions=("a cat",)) for number in range(200)]
    tasks[70] = Task(name="crash", entry=Crashing(signal.SIGSEGV))
    tasks[150] = Task(name="fault", entry=Faulty())
    results = list(check_on_ray(tasks, options=OPTIONS, context_length=77, workers=2))
    assert os.path.exists(tmp_path / "mark"), "no process of Ray was killed"
    problems = {n: result for n, result in enumerate(results) if isinstance(result, Problem)}
    assert {n: problem.kind for n, problem in problems.items()} == {70: "crash", 150: "failed"}
    checked = [result for result in results if isinstance(result, Checked)]
    assert len(checked) == 198
    assert {result.picture.data for result in checked} == {jpeg(3)}
