"""`unicl-pretrain` under each objective, on real images: what it feeds, writes and refuses."""

import dataclasses
import json
import shutil

import pytest
from compared_runs import losses_of
from pack_runs import jpeg
from packed_sets import Sample, pack
from program_runs import SMALL, STEPS, call, evaluated, refusal_of, run, weights

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.objectives.registry import make_objective
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.tools import pretrain
from unicl_fast.tools.evaluate import __main__ as evaluate
from unicl_fast.tools.pack import __main__ as pack_program
from unicl_fast.training.data import build_prompts, open_datasets, rows_of_class_names
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.settle import settle_objective

pytestmark = [pytest.mark.dali, pytest.mark.slow]


def test_a_classifier_is_trained_resumed_and_evaluated(data, tmp_path):
    """Twice the same data: 20 rows."""
    arguments = [*SMALL, "--objective.name", "ce", "--data.train", data / "labels", data / "labels"]
    arguments += ["--data.evaluate", data / "labels"]
    call(pretrain, *arguments, "--out", tmp_path / "one")
    model = load_encoders(tmp_path / "one")
    assert model.text_encoder is None
    assert model.class_rows.shape == (20, model.image_encoder.num_features + 1)
    (last,) = [line for line in read_metrics(tmp_path / "one") if "accuracy/labels/top1" in line]
    assert 0 <= last["accuracy/labels/top1"] <= last["accuracy/labels/top5"] <= 1
    unbroken = losses_of(tmp_path / "one"), weights(tmp_path / "one")
    for checkpoint in list_checkpoints(tmp_path / "one" / "checkpoints")[STEPS // 4 :]:
        shutil.rmtree(checkpoint)
    call(pretrain, *arguments, "--resume", "auto", "--out", tmp_path / "one")
    assert (losses_of(tmp_path / "one"), weights(tmp_path / "one")) == unbroken
    sets = ["--train", data / "labels", "--data", data / "labels", "--layer", "projection"]
    said = refusal_of(evaluate, "knn", "--checkpoint", tmp_path / "one", *sets, "--device", "cpu")
    assert "use the encoder's features (--layer encoder)" in said


def test_images_of_several_labels_in_a_hierarchy(shared_data, data, tmp_path, capsys):
    """COCO's photographs, mixed with captions; on two ranks; then level by level."""
    coco, tree = shared_data / "captions" / "coco", tmp_path / "tree.json"
    groups = {"animal": ["dog", "cat", "bear", "cow", "horse", "sheep", "bird", "zebra", "giraffe"]}
    groups["kitchenware"] = ["bottle", "bowl", "cup", "fork", "knife", "spoon", "wine glass"]
    groups["living being"] = ["animal", "person"]
    tree.write_text(json.dumps({child: top for top, below in groups.items() for child in below}))
    packed = tmp_path / "coco"
    call(pack_program, "build", coco / "captions.jsonl", "--out", packed, "--hierarchy", tree)
    assert "classes placed, 3 classes above" in capsys.readouterr().out
    several = [*SMALL, "--data.train", packed, data / "captions", "--efficiency.precision", "fp64"]
    one, two = tmp_path / "one", tmp_path / "two"
    call(pretrain, *several, "--out", one)
    run("pretrain", *several, "--out", two, "--nproc", "2")
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-9)
    positives = [line["positives_per_row/coco"] for line in read_metrics(one) if "loss" in line]
    assert max(positives) > 1.5
    one = tmp_path / "levels"
    call(pretrain, *several, "--data.prompts", "levels", "--out", one)
    assert len(losses_of(one)) == STEPS
    found = evaluated("zero-shot", one, "--data", packed, "--hierarchy", "--average-precision")
    assert "top-1 by its names" in capsys.readouterr().out
    scores = found["hierarchy"]["levels"]
    assert [level["depth"] for level in scores] == [0, 1, 2]
    assert scores[0]["num_samples"] == found["num_samples"] == 97
    assert 0 < found["hierarchy"]["distance_of_mistakes"] <= 3
    precision = found["average_precision"]
    assert precision["num_samples"] == 97
    assert len(precision["per_class"]) == 59  # more than are the first label of an image
    labels = ["--data", data / "labels", "--hierarchy", "--device", "cpu"]
    said = refusal_of(evaluate, "zero-shot", "--checkpoint", one, *labels)
    assert "labels has no hierarchy of classes" in said


def test_labels_are_needed_and_their_number_must_be_right(data):
    """Also in what is evaluated: cross-entropy knows no captions."""
    settings = ["--objective.name", "ce", "--data.train", data / "labels", "--out", data / "none"]
    assert refusal_of(pretrain, *SMALL, *settings, "--data.evaluate", data / "captions")
    config = build_preset("digits-small")
    with_captions = dataclasses.replace(config.data, train=(str(data / "captions"),))
    datasets, _ = open_datasets(with_captions)
    ce = dataclasses.replace(config, objective=make_objective(name="ce"))
    with pytest.raises(ValueError, match=r"20 of 20 samples .* have none: leave it out"):
        settle_objective(ce, datasets)
    labelled = dataclasses.replace(config.data, train=(str(data / "labels"),) * 2)
    datasets, _ = open_datasets(labelled)
    suited = settle_objective(ce, datasets)
    assert suited.objective.num_classes == (10, 10)
    assert suited.data.text == "labels"
    wrong = dataclasses.replace(ce, objective=make_objective(name="ce", num_classes=(9,)))
    with pytest.raises(ValueError, match=r"is \(9,\), but the data has \(10, 10\)"):
        settle_objective(wrong, datasets)
    by_level = dataclasses.replace(labelled, prompts="levels")
    with pytest.raises(ValueError, match="no data set of data.train has one: pack with --hier"):
        settle_objective(dataclasses.replace(config, data=by_level), datasets)
    prompts = build_prompts(datasets[1:], config)
    rows = rows_of_class_names(datasets[1:], ["cat", "airplane"], prompts=prompts)
    assert rows.tolist() == [3, 0]
    with pytest.raises(ValueError, match="such as 'unicorn'"):
        rows_of_class_names(datasets[1:], ["cat", "unicorn"], prompts=prompts)


def test_classes_that_are_one_in_training_are_evaluated_by_its_row(tmp_path):
    """Names that differ in capitals give the same tokens, so only the first one's row learns."""
    samples = [Sample(jpeg(number), labels=[number]) for number in range(3)]
    names = [("dog", "cat", "Cat"), ("CAT", "hen", "Dog")]
    datasets = [
        pack(tmp_path / str(number), samples, class_names=some, tokenizer=Tokenizer())
        for number, some in enumerate(names)
    ]
    prompts = build_prompts(datasets, build_preset("digits-small"))
    asked = ["hen", "Cat", "CAT", "cat", "Dog"]
    assert rows_of_class_names(datasets, asked, prompts=prompts).tolist() == [4, 1, 1, 1, 0]
