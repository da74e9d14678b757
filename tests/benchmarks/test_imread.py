"""`unicl-bench imread`: who decodes what is known before anything is timed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unicl_fast.benchmarks.harness import Turn
from unicl_fast.benchmarks.input import imread
from unicl_fast.benchmarks.input.imread import EpochTask, check_libraries, write_files
from unicl_fast.benchmarks.run import main


def jpeg(mode: str, **options: int) -> bytes:
    file = io.BytesIO()
    ramp = np.add.outer(np.arange(24), np.arange(32)).astype(np.uint8)
    Image.fromarray(ramp).convert(mode).save(file, format="JPEG", **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images that decoders agree on, one that is cut, and a text."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(jpeg("RGB", quality=60 + number))
    (root / "deep" / "grey.JPEG").write_bytes(jpeg("L"))
    (root / "deep" / "cut.jpg").write_bytes(jpeg("RGB")[:400])
    (root / "notes.txt").write_text("no image")
    return root


def task_of(scratch: Path, library: str, indices: tuple[int, ...], **more: int) -> EpochTask:
    sizes = {"batch_size": 2, "image_size": 16, "threads": 0} | more
    return EpochTask(data=scratch, scratch=scratch, library=library, indices=indices, **sizes)


def test_files_that_a_library_refuses_are_skipped_for_it_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = write_files(folder, tmp_path / "scratch", most=0)
    assert count == 5
    task = task_of(tmp_path / "scratch", "", tuple(range(count)))
    names = ["0.jpg", "1.jpg", "2.jpg", "deep/cut.jpg", "deep/grey.JPEG"]
    assert list(task.images()) == [(folder / name).read_bytes() for name in names]

    def missing() -> imread.Decode:
        raise ImportError("No module named 'cv2'")

    def brighter() -> imread.Decode:
        decode = imread._pillow()
        return lambda data: decode(data) + np.uint8(5)

    libraries = imread.LIBRARIES | {
        "opencv": (missing, "opencv-python-headless"),
        "other": (brighter, "other"),
        "grey": (lambda: lambda data: np.zeros((24, 32), np.uint8), "grey"),
    }
    monkeypatch.setattr(imread, "LIBRARIES", libraries)
    asked = ["pillow", "simplejpeg", "torchvision", "opencv", "other", "grey"]
    indices, left_out = check_libraries(asked, tmp_path / "scratch", count)
    assert indices["pillow"] == indices["simplejpeg"] == (0, 1, 2, 4)
    assert set(left_out) == {"opencv", "other", "grey"}
    assert left_out["opencv"].endswith("to have it: pip install opencv-python-headless")
    assert left_out["other"] == "file 0: its pixels differ from Pillow's by 5.00 levels in the mean"
    assert left_out["grey"] == "file 0: it makes uint8 [24, 32], not uint8 [h w 3]"


def test_epochs_show_each_decodable_file_once(folder: Path, tmp_path: Path) -> None:
    write_files(folder, tmp_path / "scratch", most=0)
    task = task_of(tmp_path / "scratch", "pillow", (0, 2, 4))
    decoding, loading = imread.decoding_epochs(task), imread.loader_epochs(task)
    try:
        assert [next(decoding), next(decoding)] == [3, 3]
        assert [next(loading), next(loading)] == [3, 3]
    finally:
        imread.gc.enable()


def test_a_folder_without_jpegs_is_refused_and_one_must_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNICL_TEST_DATA", raising=False)
    asked = {
        "holds no JPEG": ["--folder", str(tmp_path)],
        "name a folder of JPEGs by --folder": [],
        "'jpeg4py' is not among pillow": ["--folder", str(tmp_path), "--libraries", "jpeg4py"],
    }
    for said, options in asked.items():
        if "among" in said:
            (tmp_path / "1.jpg").write_bytes(jpeg("RGB"))
        with pytest.raises(SystemExit):
            main(["imread", *options])
        assert said in capsys.readouterr().err


def test_the_verdict_compares_where_the_fastest_library_is_at_its_best() -> None:
    def turns(*rates: float) -> list[Turn]:
        return [Turn(1 / rate, 1 / rate) for rate in rates]

    taken = {
        "one thread": {"unicl_fast-whole": turns(900), "pillow": turns(500), "cv": turns(2000)},
        "0 workers": {"unicl_fast-whole": turns(800), "pillow": turns(500), "cv": turns(900)},
        "2 workers": {"unicl_fast-whole": turns(1500), "pillow": turns(800), "cv": turns(1000)},
        "4 workers": {"unicl_fast-whole": turns(1400), "pillow": turns(700), "cv": turns(900)},
    }
    figures = imread._figures(taken)
    assert imread.verdict(figures, taken) == (
        "unicl_fast-whole makes 1.50 (1.50 to 1.50) times the images/s of cv, the fastest library "
        "in a DataLoader, at its best with 2 workers and as many threads of ours: 1,500 (1,500 to "
        "1,500) beside 1,000 (1,000 to 1,000)."
    )
    tasks = {name: task_of(Path(), name, (0, 1, 3)) for name in taken["one thread"]}
    assert "| pillow | 500 (500 to 500) | 500 (500 to 500) | 800" in imread.table(
        figures, taken, tasks, 4
    )
    assert imread._summary(turns(100, 300), 3, 4) == {
        "images_per_second_mean": pytest.approx(200),
        "images_per_second_std": pytest.approx(20000**0.5),
        "us_per_image_mean": pytest.approx(1e4 * 2 / 3),
        "images_per_second_p50": pytest.approx(200),
        "images_per_second_p90": pytest.approx(280),
        "images_per_second_p99": pytest.approx(298),
        "us_per_image_p50": pytest.approx(1e4 * 2 / 3),
        "us_per_image_p90": pytest.approx(1e4 * 28 / 30),
        "us_per_image_p99": pytest.approx(1e4 * 298 / 300),
        "raw_times_s": pytest.approx([0.03, 0.01]),
        "raw_throughput_ips": pytest.approx([100, 300]),
        "num_images_total": 4,
        "num_images_decoded": 3,
        "num_images_skipped": 1,
        "skip_rate": 0.25,
    }


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.dali
def test_the_protocol_runs_on_real_images(shared_data: Path, tmp_path: Path) -> None:
    options = ["--images", "24", "--workers", "0", "2", "--batch-size", "8"]
    libraries = [
        "--rounds",
        "2",
        "--seconds",
        "0.2",
        "--libraries",
        "pillow",
        "simplejpeg",
        "--image-size",
        "64",
    ]
    folder = ["--folder", str(shared_data / "decode")]
    main(["imread", *folder, *options, *libraries, "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["left_out"] == {}
    kinds = {(each["library"], "worker_results" in each) for each in result["results"]}
    names = {"pillow", "simplejpeg", "unicl_fast", "unicl_fast-whole"}
    assert kinds == {(name, is_loader) for name in names for is_loader in (False, True)}
    for each in result["results"]:
        runs = each.get("worker_results", [each.get("benchmark_results")])
        assert [len(run["raw_times_s"]) for run in runs] == [2] * len(runs)
        assert all(0 < run["images_per_second_mean"] < 1e6 for run in runs)
        workers = [run.get("num_workers") for run in runs]
        assert workers in ([None], [0, 2])
    assert "unicl_fast-whole / pillow, 2 workers" in result["figures"]
