"""`unicl-eval` as a user runs it, on real images: several data sets, probes, retrieval, ranks."""

import io
import json
import re
import shlex
import shutil
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from object_stores import empty, upload
from PIL import Image
from program_runs import SMALL, call, evaluated, refusal_of
from pyarrow import parquet

from unicl_fast import load_model
from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.conversion.sources import weights_checksum
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation import serving
from unicl_fast.evaluation.data import protocol_metric, short_name
from unicl_fast.models.unicl import UniCL
from unicl_fast.text.class_lists import read_class_names, read_templates
from unicl_fast.tools import pretrain
from unicl_fast.tools.evaluate import __main__ as evaluate
from unicl_fast.tools.evaluate import registry
from unicl_fast.tools.evaluate.knn import Knn
from unicl_fast.tools.pack import __main__ as packing
from unicl_fast.training.metrics import read_metrics

pytestmark = pytest.mark.dali

DTD_KINDS = ("texture", "pattern", "thing", "object")


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    out = data / "evaluated"
    call(pretrain, *SMALL, "--data.train", data / "labels", "--out", out, "--run.steps", "4")
    return out


def test_a_checkpoint_that_comes_meanwhile_is_not_the_one_evaluated(
    data, trained, tmp_path, monkeypatch
):
    """A run that still trains writes its next checkpoint while images are encoded."""
    run_folder, aside = tmp_path / "run", tmp_path / "aside"
    shutil.copytree(trained, run_folder)
    first, last = list_checkpoints(run_folder / "checkpoints")
    last.rename(aside)

    def load_meanwhile(path: Path) -> UniCL:
        model = load_encoders(path)
        aside.rename(last)
        return model

    monkeypatch.setattr("unicl_fast.evaluation.features.load_encoders", load_meanwhile)
    found = evaluated("zero-shot", run_folder, "--data", data / "labels")
    assert last.is_dir()
    assert found["checkpoint"] == str(first)
    assert found["weights_xxh3"] == weights_checksum(first)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (evaluate, ("search", "--checkpoint", "run", "--query", "x", "--data")),
        (evaluate, ("serve", "--checkpoint", "run", "--data")),
        (evaluate, ("knn", "--checkpoint", "run", "--data", "test", "--train")),
        (packing, ("inspect", "--no-near")),
        (packing, ("verify",)),
    ],
)
def test_several_data_sets_are_refused_with_the_command_that_joins_them(program, words):
    said = " ".join(refusal_of(program, *words, "one", "the other").replace("│", "").split())
    assert "one data set is taken, not 2: unicl-pack build one 'the other' --out DIR" in said
    assert "name a data set" in refusal_of(program, *words)


def test_images_of_a_folder_are_classified_and_embedded(data, trained, tmp_path, capsys):
    """As from Python, for a folder and for the data set packed from it."""
    where = ["--checkpoint", trained, "--device", "cpu"]
    (cut,) = (folder / "cut.jpg" for folder in data.glob("classes/**/cat"))
    call(evaluate, "embed", *where, "--data", data / "labels", "--out", tmp_path / "rows.npy")
    for out in ("rows.parquet", "answers.jsonl"):
        command = ["embed"] if out == "rows.parquet" else ["classify", "--classes", "cat", "frog"]
        cut.write_bytes(b"\xff\xd8\xff no image")
        call(evaluate, *command, *where, "--data", data / "classes", "--out", tmp_path / out)
        cut.unlink()
        assert re.search(r"left out: 1 file \(\S+cut.jpg\)", capsys.readouterr().out)
    table = parquet.read_table(tmp_path / "rows.parquet").to_pydict()
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    model = load_model(trained, device="cpu")
    paths = [data / "classes" / path for path in table["name"]]
    expected = model.embed_images(paths)
    np.testing.assert_allclose(table["feature"], expected, atol=2e-2)
    by_name = {path.parent.name for path in paths}
    assert {labels[0] for labels in table["labels"]} == by_name
    rows = np.load(tmp_path / "rows.npy")
    assert sorted(map(tuple, rows)) == sorted(map(tuple, table["feature"]))
    assert [one["name"] for one in answers] == table["name"]
    for answer, other in zip(answers, model.classify(paths, ["cat", "frog"]), strict=True):
        assert answer["classes"] == pytest.approx(other, abs=0.02)
    call(evaluate, "classify", *where, "--data", data / "labels", "--classes", "cat", "frog")
    assert capsys.readouterr().out.count("%") == 2 * len(rows)
    call(evaluate, "classify", *where, "--data", paths[0], "--top", "10")  # by the run's classes
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{paths[0].name}: ")
    with PackedDataset(data / "labels") as dataset:
        names = dataset.manifest.class_names
    assert {one.rpartition(" ")[0] for one in line.split(": ")[1].split(", ")} == set(names)


def test_images_in_a_plain_folder_are_classified(data, trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    names = ["a.jpg", "train/b.jpg", "val/deep/c.jpg"]
    for name, image in zip(names, sorted(data.glob("classes/**/*.jpg")), strict=False):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, photos / name)
    (photos / "notes.txt").touch()
    where = ["--checkpoint", trained, "--device", "cpu", "--data", photos]
    call(evaluate, "classify", *where, "--classes", "cat", "frog")
    said = capsys.readouterr().out
    assert sorted(line.split(":")[0] for line in said.splitlines() if "%" in line) == names
    assert f"{photos} has no captions" in refusal_of(evaluate, "retrieval", *where)


def test_a_data_set_is_searched_by_texts_and_images(data, trained, monkeypatch, capsys):
    image = next(data.glob("classes/**/0001.jpg"))
    search = ["search", "--checkpoint", trained, "--device", "cpu", "--data", data / "labels"]
    call(evaluate, *search, "--query", "a frog", "a cat", "--image", image, "--top", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == [str(image), "a frog", "a cat"]
    assert re.fullmatch(r"  1\.000  \S+0001\.jpg \[\w+\]  classes/\S+0001\.jpg", lines[1]), lines
    assert len(lines) == 9
    monkeypatch.setattr("sys.stdin", io.StringIO("a frog\n\n"))
    call(evaluate, *search, "--top", "2")
    assert capsys.readouterr().out.splitlines() == lines[3:6]
    assert len(list((trained / "features").glob("*.npy"))) == 2, "of images, and of class names"
    call(evaluate, *search, "--query", "frogs", "a forg", "--by", "words", "--top", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [lines[row].split("[")[1].split("]")[0] for row in (1, 2, 4, 5)] == ["frog"] * 4
    assert "there is no such file" in refusal_of(evaluate, *search, "--image", data / "none.jpg")


def test_the_lines_of_python_find_what_the_commands_find(data, trained, capfd):
    """Those of docs/evaluation.md, which print nothing."""
    text = Path(__file__).parents[2].joinpath("docs", "evaluation.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    for name, path in (
        ("runs/first", trained), ("packed/pets", data / "labels"),
        ("packed/flickr-val", data / "captions"), ("packed/dtd-train", data / "labels"),
        ("packed/dtd-test", data / "classes"), ("packed/shop", data / "captions"),
    ):  # fmt: skip
        code = code.replace(name, str(path))
    capfd.readouterr()
    found: dict[str, Any] = {}
    exec(code, found)
    assert capfd.readouterr() == ("", "")
    sets = ["--train", data / "labels", "--data", data / "classes", "--features", "none"]
    zero = evaluated("zero-shot", trained, "--data", data / "labels")
    pairs = evaluated("retrieval", trained, "--data", data / "captions")
    probe, knn = (evaluated(kind, trained, *sets) for kind in ("linear-probe", "knn"))
    for values, name in ((zero, "pets"), (pairs, "recalls"), (probe, "probe")):
        assert values.items() >= json.loads(json.dumps(found[name].to_json())).items(), name
    by_k = found["neighbours"]
    assert [row["top1"] for row in knn["results"]] == [by_k[k].top1 for k in (10, 20)]


def test_several_data_sets_make_one_table_and_their_images(data, trained, tmp_path, capsys):
    alone = evaluated("zero-shot", trained, "--data", data / "labels")
    pets = tmp_path / "pets"
    shutil.copytree(data / "labels", pets)
    capsys.readouterr()
    values = evaluated(
        *("zero-shot", trained, "--data", data / "labels", pets, data / "classes"),
        *("--templates", "imagenet", "simple", "own", "--markdown", tmp_path / "table.md"),
        *("--figures", tmp_path / "figures"),
    )
    labels, means, folders = values["data_sets"]
    assert labels["num_samples"] == alone["num_samples"] == 21
    assert (labels["metric"], labels["num_templates"]) == ("top1", 80)
    assert (means["metric"], means["num_templates"]) == ("mean_per_class", 1)
    for key in ("num_classes", "top1", "top5", "mean_per_class", "per_class"):
        assert folders[key] == alone[key], "the same images"
    expected = labels["top1"] + means["mean_per_class"] + folders["top1"]
    assert values["mean"] == pytest.approx(expected / 3)
    table = (tmp_path / "table.md").read_text()
    shown = capsys.readouterr()
    assert table.strip() in shown.out
    rows = [line.split("|")[1].strip() for line in table.splitlines()]
    assert rows == ["data set", rows[1], "labels", "pets", "classes", "mean"]
    for name in ("labels", "pets", "classes"):
        assert Image.open(tmp_path / "figures" / f"confusion-{name}.png").size[0] > 500


def test_the_recipe_averages_two_models(trained, tmp_path):
    text = Path(__file__).parents[2].joinpath("docs", "recipes.md").read_text(encoding="utf-8")
    (code,) = (one for one in re.findall(r"```python\n(.*?)```", text, re.S) if "lerp_" in one)
    first, last = list_checkpoints(trained / "checkpoints")
    for name, path in (("runs/clip", first), ("runs/mine", last), ("models", tmp_path)):
        code = code.replace(name, str(path))
    exec(code, {})
    models = [load_encoders(path).state_dict() for path in (first, last, tmp_path / "half")]
    for before, after, half in zip(*(model.values() for model in models), strict=True):
        torch.testing.assert_close(half, torch.lerp(before, after, 0.5))


def test_the_metric_follows_the_protocol_and_names_tell_data_sets_apart():
    for name in ("OxfordIIITPet", "pets", "oxford-flowers-102", "FGVCAircraft", "caltech101-test"):
        assert protocol_metric(name) == "mean_per_class", name
    for name in ("CIFAR10", "food101", "StanfordCars", "petsounds"):
        assert protocol_metric(name) == "top1", name
    assert short_name("https://me:secret@host/bucket/pets/?X-Amz-Signature=secret") == "pets"


def require_clip_benchmark() -> None:
    pytest.importorskip("clip_benchmark", reason="pip install --no-deps clip-benchmark")


def test_data_sets_of_clip_benchmark_have_its_lists():
    require_clip_benchmark()
    kinds = [f"a photo of {word} {{}} {kind}." for word in ("a", "the") for kind in DTD_KINDS]
    assert read_templates("clip-benchmark:dtd") == tuple(kinds)
    names = read_class_names("clip-benchmark:pets")
    assert (len(names), names[0], names[-1]) == (37, "Abyssinian", "Yorkshire Terrier")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("zero-shot --data {tmp}/nothing", "nothing is at"),
        ("zero-shot --data {captions}", "has no classes"),
        ("zero-shot --data {labels} --batch-size 0", "not 0"),
        ("zero-shot --data {labels} {labels} --templates simple simple simple",
         "--templates needs one value for all data sets or one for each of the 2, not 3"),
        ("zero-shot --data {labels} {labels}/", "is the same data set as"),
        ("zero-shot --data {labels} --class-names clip-benchmark:nothing", "it has them for"),
        ("zero-shot --data {labels} --class-names clip-benchmark:pets", "37 names"),
        ("linear-probe --train {labels} --data {labels} --shots 1 --figures {tmp}",
         "--figures draws the mistakes of one classifier"),
        ("linear-probe --train {labels} --data {labels} --shots 3 --validation {labels} --c 1",
         "give one of the two"),
        ("embed --data {labels} --out {tmp}/a.csv", "end in .npy or .parquet"),
        ("classify --data {labels} --classes a a", "two or more class names"),
        ("search --data {tmp}/sets --query a", "holds packed data sets: name one: {tmp}/sets/a"),
        ("search --data {labels} --query a --by nothing", "invalid choice"),
        ("serve --host 0.0.0.0", "--host 0.0.0.0 answers other machines: give --token, too"),
    ],
)  # fmt: skip
def test_wrong_uses_are_refused(data, trained, tmp_path, arguments, message):
    if "clip-benchmark" in arguments:
        require_clip_benchmark()
    places = {"tmp": tmp_path, "labels": data / "labels", "captions": data / "captions"}
    words = [word.format(**places) for word in arguments.split()]
    if "/sets" in arguments:
        shutil.copytree(data / "labels", tmp_path / "sets" / "a")
    assert message.format(**places) in refusal_of(
        evaluate, *words, "--checkpoint", trained, "--device", "cpu"
    )


def test_a_linear_probe_finds_its_features_again(data, trained, tmp_path, caplog):
    caplog.set_level("INFO")
    features = tmp_path / "features"
    sets = ["--train", data / "labels", "--data", data / "classes", "--features", features]
    alone = evaluated("linear-probe", trained, *sets, "--figures", tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in features.iterdir()}
    # the folder of classes holds the same files in the same order as the packed set
    assert len({path.name.partition(".")[0] for path in kept}) == 1
    assert len(kept) == 3
    assert (alone["num_train"], alone["num_test"], alone["num_fitted"]) == (21, 21, 21)
    assert alone["c"] in [row["c"] for row in alone["validation"]]
    assert (alone["c_chosen_by"], alone["num_folds"]) == ("cross-validation", 2)
    assert Image.open(tmp_path / "confusion-linear-probe.png").size[0] > 500
    caplog.clear()
    again = evaluated("linear-probe", trained, *sets)
    assert caplog.text.count("found again") == 2
    assert {path: path.stat().st_mtime_ns for path in features.iterdir()} == kept
    for key in ("c", "top1", "top5", "per_class", "validation"):
        assert again[key] == alone[key], key
    few = ["--shots", "1", "3", "--draws", "1", "--c", "1"]
    shots = evaluated("linear-probe", trained, *sets, *few)
    assert [row["c"] for row in shots["shots"]] == [[1.0], [1.0]]
    assert shots["smallest_class"] == 2, "of nine classes there are two images, of cats three"
    other_layer = evaluated("linear-probe", trained, *sets, "--layer", "projection", "--c", "1.0")
    assert len(list(features.iterdir())) == 3, "they follow from the encoder's"
    assert (alone["num_features"], other_layer["num_features"]) == (64, 64)


def test_a_class_that_training_lacks_is_refused(data, trained, tmp_path):
    shutil.copytree(data / "classes", tmp_path / "test")
    folder = next((tmp_path / "test").rglob("cat"))
    folder.rename(folder.with_name("unicorn"))
    sets = ["--train", data / "labels", "--data", tmp_path / "test", "--features", "none"]
    message = refusal_of(evaluate, "linear-probe", "--checkpoint", trained, *sets)
    assert "has the class 'unicorn', which the training data labels lacks" in message


def test_retrieval_reads_urls_and_lists_and_reports_chance(
    data, trained, shared_data, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    url = upload(data / "captions", "faulty://bucket/pairs")
    found = evaluated("retrieval", trained, "--data", url)
    empty()
    assert found["data"] == url
    assert found["num_captions"] == 5 * found["num_images"] == 100
    assert found["text_to_image_recall_at_5_chance"] == pytest.approx(5 / 20)
    flickr = shared_data / "captions" / "flickr8k"
    lines = (flickr / "captions.jsonl").read_text().splitlines()[:3]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    (tmp_path / "images").mkdir()
    for line in lines:
        shutil.copy(flickr / json.loads(line)["image"], tmp_path / "images")
    assert evaluated("retrieval", trained, "--data", tmp_path / "list.jsonl")["num_images"] == 3


def test_a_port_in_use_is_refused_before_a_model_is_loaded(trained, monkeypatch, capsys):
    monkeypatch.setattr("unicl_fast.evaluation.inference.load_model", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as ended:
            call(evaluate, "serve", "--checkpoint", trained, "--port", port)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"127.0.0.1, port {port}: Address already in use; --port 0 picks a free one" in said


def test_the_page_starts_with_all_classes_of_the_model(trained, monkeypatch):
    names = tuple(map(str, range(1001)))
    monkeypatch.setattr("unicl_fast.tools.evaluate.serve.Serve.own_classes", lambda _: {"": names})
    monkeypatch.setattr("unicl_fast.evaluation.inference.load_model", Mock())
    for name in ("make_server", "make_app"):
        monkeypatch.setattr(serving, name, made := Mock())
    call(evaluate, "serve", "--checkpoint", trained, "--port", "0")
    assert made.call_args.kwargs["columns"] == {"": names}


OWN = """
from dataclasses import dataclass

from unicl_fast.tools.evaluate.command import Number
from unicl_fast.tools.evaluate.frozen_features import FrozenFeatures

@dataclass(frozen=True, kw_only=True)
class Majority(FrozenFeatures):
    '''How often the label is one of the most frequent in training.'''

    guesses: Number = 1
    '''Labels that are guessed.'''

    def measure(self, sets, *, metric, suffix):
        import numpy as np

        best = np.bincount(sets[0].labels).argsort()[::-1][: self.guesses]
        rate = float(np.isin(sets[1].labels, best).mean())
        return {"rate": rate}, f"{rate:.3f}"
"""


def test_an_evaluation_is_a_file_and_a_line(
    data, trained, tmp_path, monkeypatch,
    capsys,
):  # fmt: skip
    """Its options, its help, refusals, and files of results come with it."""
    module = ModuleType("unicl_fast.tools.evaluate.majority")
    module.__file__ = str(tmp_path / "majority.py")  # where the help reads the docstrings
    Path(module.__file__).write_text(OWN)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(OWN, module.__dict__)
    monkeypatch.setitem(registry.COMMANDS, "majority", "majority:Majority")
    sets = ["--train", data / "labels", "--data", data / "classes"]
    found = evaluated("majority", trained, *sets, "--guesses", "2", "--markdown", tmp_path / "a.md")
    assert (found["protocol"], found["num_test"], found["rate"]) == ("majority", 21, 5 / 21)
    assert (tmp_path / "a.md").read_text() == "0.238\n"
    command = ["majority", "--checkpoint", trained, *sets]
    assert "--guesses" in refusal_of(evaluate, *command, "--guesses", "0")
    with pytest.raises(SystemExit):
        call(evaluate, "majority", "--help")
    assert "Labels that are guessed." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "retrieval --data captions",
        pytest.param(
            "linear-probe --train labels --data classes --features none", marks=pytest.mark.long
        ),
        "zero-shot --data classes labels --batch-size 5",
    ],
)
def test_two_ranks_equal_one(data, trained, words):
    sets = ("captions", "labels", "classes")
    kind, *more = (str(data / word) if word in sets else word for word in words.split())
    assert evaluated(kind, trained, *more, nproc=2) == evaluated(kind, trained, *more)


def test_a_run_is_fine_tuned_on_labels(data, trained, tmp_path):
    """By the recipe of docs/evaluation.md; at so small a rate the encoder stays the run's."""
    text = Path(__file__).parents[2].joinpath("docs", "evaluation.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^    unicl-pretrain (.*--init .*)$", text.replace("\\\n", " "), re.M)
    recipe = recipe.replace("runs/first-dtd", str(tmp_path)).replace("runs/first", str(trained))
    for name in ("train", "test"):
        recipe = recipe.replace(f"packed/dtd-{name}", str(data / "labels"))
    few = ["--run.global-batch-size", "8", "--run.steps", "6", "--optim.lr", "1e-7"]
    call(pretrain, *shlex.split(recipe), *few)
    lines = [line for line in read_metrics(tmp_path) if "accuracy/labels/top1" in line]
    assert [line["step"] for line in lines] == [0, 6]  # its start is measured, too
    first, tuned = load_encoders(trained), load_encoders(tmp_path)
    assert tuned.class_rows.shape == (10, tuned.image_encoder.num_features + 1)
    found = tuned.image_encoder.state_dict()
    for name, weight in first.image_encoder.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("Connection closed by peer [127.0.0.1]:4711", "another rank has ended"),
        ("Timed out waiting 600000ms for recv operation to complete", "another rank hangs"),
    ],
)
def test_a_rank_that_lost_another_says_so(trained, tmp_path, monkeypatch, error, sentence):
    monkeypatch.setattr(Knn, "check", lambda self: None)
    monkeypatch.setattr(Knn, "run", Mock(side_effect=RuntimeError(error)))
    words = ["knn", "--checkpoint", trained, "--train", tmp_path, "--data", tmp_path]
    assert f"unicl-eval: {sentence}" in refusal_of(evaluate, *words, code=1)
