"""Trivial baselines beside the figures of a run: by `unicl-eval`, and at the end of training."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from program_runs import SMALL, call, evaluated

from unicl_fast import load_model
from unicl_fast.batch import EvaluationLoader
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation import baselines
from unicl_fast.evaluation.features import ModelOnRanks
from unicl_fast.evaluation.predicted import PredictedWords
from unicl_fast.evaluation.report import percent
from unicl_fast.evaluation.search import open_index
from unicl_fast.tools import pretrain
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.trainer import Trainer

pytestmark = pytest.mark.dali
FIXED = [
    *("--data.crop-scale", "1", "1", "--data.crop-ratio", "1", "1", "--optim.freeze", "image"),
    *("--data.flip-probability", "0", "--run.steps", "2"),
]


SAID: list[str] = []


@pytest.fixture(scope="module")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on labels and captions, which are copies that a test may remove."""
    folder = tmp_path_factory.mktemp("beside")
    for name in ("labels", "captions"):
        shutil.copytree(data / name, folder / name)
    compare = pretrain.compare_with_baselines

    def keep(trainer: Trainer, out: Path) -> list[str]:
        SAID.extend(compare(trainer, out))
        return SAID

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "compare_with_baselines", keep)
        call(
            pretrain, *SMALL, *FIXED, "--data.train", folder / "labels", folder / "captions",
            "--data.evaluate", data / "labels", data / "captions", "--out", folder / "run",
            "--efficiency.stored-features", folder / "stored",
        )  # fmt: skip
    return folder / "run"


def test_the_end_of_a_run_shows_baselines_from_its_stored_features(run_folder):
    last = {name: value for line in read_metrics(run_folder) for name, value in line.items()}
    labels, captions = SAID
    assert labels.startswith("zero_shot/labels, after the last step:\n")
    assert percent(last["zero_shot/labels/top1"]) in labels
    assert "nearest neighbour" in labels
    assert captions.startswith("retrieval/captions, after the last step:\n")
    assert "ridge to tf-idf" in captions
    assert "R@10, %" in captions


def test_words_are_learnt_once_for_all_searches(data, run_folder, tmp_path, monkeypatch):
    model = load_model(run_folder)
    with open_index(model, data / "classes", folder=tmp_path) as index:
        first = index.scores(["a dog"], ["predicted"])["predicted"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(PredictedWords, "_learn", None)
        patch.setattr(PredictedWords, "of_images", None)
        with open_index(model, data / "classes", folder=tmp_path) as index:
            again = index.scores(["a dog"], ["predicted"])["predicted"]
    np.testing.assert_array_equal(again, first)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    train = baselines.training_part(model.encoders).captioned()
    others = [["a dog"], *train.captions[1:]]
    learnt, kept = (PredictedWords(train.features, others, place) for place in (None, tmp_path))
    np.testing.assert_array_equal(kept.of_texts(["a dog"]), learnt.of_texts(["a dog"]))
    for path in tmp_path.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        PredictedWords(train.features, others, tmp_path)


def test_a_search_predicts_words_from_images_as_the_baseline_does(data, run_folder, tmp_path):
    model = load_model(run_folder)
    with open_index(model, data / "classes", folder=tmp_path) as index:
        assert index.signals == ["images", "predicted", "titles", "words"]
        found = index.scores(["a dog", "nonsenseword"], ["images", "predicted"])
        dataset = index.dataset
        encoded = ModelOnRanks.of(model).features(dataset, layer="encoder")
        train = baselines.training_part(model.encoders).captioned()
        words = PredictedWords(train.features, train.captions)
        scores = words.of_texts(["a dog"]) @ words.of_images(encoded.numpy()).T
        np.testing.assert_allclose(found["predicted"][0], scores[0], atol=1e-4)
        assert not found["predicted"][1].any()
        # images are encoded once: their features in the common space follow from the encoder's
        direct = model.embed_texts(["a dog"]) @ ModelOnRanks.of(model).features(dataset).numpy().T
        np.testing.assert_allclose(found["images"][0], direct[0], atol=1e-5)
    with open_index(model, data / "captions") as index:
        assert index.report.keys() == {"weights", "recall_at_100"}, "all images were trained on"
    frozen = model.encoders.config.changed(optim={"freeze": ["image", "text"]})
    model.encoders.config = frozen.changed(efficiency={"stored_features": str(tmp_path)})
    with open_index(model, data / "captions"):
        assert list(tmp_path.glob("*.items")), "titles are read from the run's features"
    model.encoders.config = frozen.changed(efficiency={"stored_features": ""})
    with open_index(model, data / "captions") as index:
        assert index.signals == ["images", "titles", "words"]


def test_evaluations_have_baselines_beside_them_and_encode_for_them_once(
    data, run_folder, capsys, monkeypatch
):
    shutil.rmtree(run_folder.parent / "stored")  # so that images are encoded for the baselines
    labels = evaluated("zero-shot", run_folder, "--data", data / "labels")
    assert "BELOW A BASELINE: this model finds less than nearest" in capsys.readouterr().out
    assert list(labels["baselines"]) == ["nearest neighbour", "logistic regression"]
    nearest = labels["baselines"]["nearest neighbour"]["top-1"]
    assert (nearest["rate"], nearest["num_tried"]) == (1.0, 21), "the training images themselves"
    captions = evaluated("retrieval", run_folder, "--data", data / "captions")
    assert list(captions["baselines"]) == ["ridge to tf-idf", baselines.TOGETHER]
    assert list(captions["baselines"]["ridge to tf-idf"]) == ["R@1", "R@5", "R@10"]
    bare = evaluated("zero-shot", run_folder, "--data", data / "labels", "--baselines", "none")
    assert bare == {name: value for name, value in labels.items() if name != "baselines"}
    loaded = list[int]()
    load = ModelOnRanks.loader

    def count(on_ranks: ModelOnRanks, dataset: PackedDataset) -> EvaluationLoader:
        loaded.append(len(dataset))
        return load(on_ranks, dataset)

    monkeypatch.setattr(ModelOnRanks, "loader", count)
    assert evaluated("zero-shot", run_folder, "--data", data / "labels") == labels
    assert loaded == [21], "the evaluated images, for zero-shot itself"
    names = [path.name for path in (data / "classes" / "test").iterdir()]
    (run_folder / "names.txt").write_text("\n".join([*names, "zebra"]))
    words = ["--data", data / "classes", "--class-names", run_folder / "names.txt"]
    found = evaluated("zero-shot", run_folder, *words)
    assert found["baselines"] == "the training data lack the class 'zebra'"


def test_a_phrase_says_why_there_are_no_baselines(data, run_folder, monkeypatch):
    words = ["zero-shot", run_folder, "--data", data / "labels"]
    monkeypatch.setattr(baselines, "MOST_IMAGES", 40)
    assert evaluated(*words)["baselines"] == "62 images would be encoded, over 40"
    monkeypatch.setattr(baselines, "MOST_STORED", 40)
    assert evaluated(*words)["baselines"] == "41 training images are over 40"
    monkeypatch.undo()
    (run_folder.parent / "labels").rename(run_folder.parent / "moved")
    assert evaluated(*words)["baselines"].endswith("labels are not on this machine")
