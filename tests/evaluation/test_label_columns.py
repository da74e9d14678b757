"""Label columns are measured each by itself, among their own classes: against plain twins."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_runs import build_set, jpeg
from program_runs import SMALL, call, evaluated
from sklearn.linear_model import LogisticRegression

from unicl_fast import load_model
from unicl_fast.conversion.figures import figures_of
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.data import all_descriptions
from unicl_fast.evaluation.features import ModelOnRanks
from unicl_fast.tools import pretrain
from unicl_fast.tools.evaluate import __main__ as evaluate
from unicl_fast.training.metrics import mean_of_main, read_metrics

pytestmark = pytest.mark.dali
COLUMNS = {"kind": ("cup", "hat", "shoe"), "colour": ("blue", "red")}
ROWS = {
    f"{number}.jpg": {
        "kind": COLUMNS["kind"][number // 7 % 3],
        "colour": [*COLUMNS["colour"], None][number % 3],
    }
    for number in range(40)
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a shop's two columns and titles; its data lie beside it."""
    folder = tmp_path_factory.mktemp("columns")
    for number, name in enumerate(ROWS):
        (folder / name).write_bytes(jpeg(6 * number))
    rows = ({"image": name, "title": f"{row['kind']} {name}", **row} for name, row in ROWS.items())
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"label_column": list(COLUMNS), "caption_column": ["title"]}
    build_set([folder / "list.jsonl"], folder / "shop", split=0.6, **columns)
    call(
        pretrain, *SMALL, "--run.steps", "4", "--run.evaluate-every-steps", "2",
        "--efficiency.precision", "fp32", "--checkpoint.every-steps", "1",
        "--data.train", folder / "shop/train", "--data.evaluate", folder / "shop/held-out",
        "--out", folder / "run",
    )  # fmt: skip
    return folder / "run"


class Twin:
    """Answers from plain arrays and the labels of the list."""

    def __init__(self, run_folder: Path) -> None:
        self.model = load_model(run_folder, device="cpu")
        self.names, self.encoded = list[list[str]](), list[Any]()
        for side in ("train", "held-out"):
            with PackedDataset(run_folder.parent / "shop" / side) as dataset:
                self.names.append([one.name for one in all_descriptions(dataset)])
                on_ranks = ModelOnRanks.of(self.model)
                self.encoded.append(on_ranks.features(dataset, layer="encoder").numpy())
                self.projected = on_ranks.features(dataset).numpy()  # of the held-out ones

    def labels(self, column: str, side: int = 1) -> dict[int, str]:
        """By number of the image, if it has one."""
        labels = enumerate(ROWS[name][column] for name in self.names[side])
        return {row: label for row, label in labels if label}

    def parts(self, column: str) -> list[Any]:
        """Features and labels to learn from, and to test on."""
        both = [self.labels(column, side) for side in (0, 1)]
        return [
            part
            for own, features in zip(both, self.encoded, strict=True)
            for part in (features[list(own)], np.array(list(own.values())))
        ]

    def names_of(self, column: str) -> list[str]:
        """The best class of each image."""
        names = COLUMNS[column]
        texts = self.model.embed_texts([f"a photo of a {name}." for name in names])
        return [names[best] for best in (self.projected @ texts.T).argmax(axis=1)]

    def zero_shot(self, column: str) -> float:
        found, labels = self.names_of(column), self.labels(column)
        return float(np.mean([found[row] == label for row, label in labels.items()]))

    def nearest(self, column: str) -> float:
        train, labels, test, expected = self.parts(column)
        unit = [one / np.linalg.norm(one, axis=1)[:, None] for one in (train, test)]
        return float(np.mean(labels[(unit[1] @ unit[0].T).argmax(axis=1)] == expected))


@pytest.fixture(scope="module")
def twin(run_folder: Path) -> Twin:
    return Twin(run_folder)


def by_column(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    assert [one["column"] for one in found["columns"]] == list(COLUMNS)
    return {one["column"]: one for one in found["columns"]}


def test_zero_shot_and_baselines_are_of_each_column(run_folder, twin, tmp_path, capsys):
    words = ["--data", run_folder.parent / "shop/held-out", "--average-precision"]
    found = evaluated("zero-shot", run_folder, *words)
    text = " ".join(capsys.readouterr().out.split())
    for column, one in by_column(found).items():
        assert one["top1"] == pytest.approx(twin.zero_shot(column)), column
        labels = twin.labels(column)
        assert one["num_samples"] == len(labels) == len(twin.projected) - one["num_without_label"]
        for classes in (one["per_class"], one["average_precision"]["per_class"]):
            assert {each["class"] for each in classes} == set(labels.values())
        assert f"| held-out, {column} |" in text
        nearest = found["baselines"]["nearest neighbour"][f"top-1 {column}"]["rate"]
        assert nearest == pytest.approx(twin.nearest(column)), column
        assert f"top-1 {column}" in found["baselines"]["logistic regression"]
    assert "| top-1 kind, % | top-1 colour, % |" in text
    (tmp_path / "found.json").write_text(json.dumps(found))
    figures, _ = figures_of(found["weights_xxh3"], [tmp_path / "found.json"], run=None)
    assert [one["data"] for one in figures] == ["held-out, kind", "held-out, colour"]


def test_probes_are_fitted_to_each_column(run_folder, twin):
    shop = run_folder.parent / "shop"
    sides = ["--train", shop / "train", "--data", shop / "held-out"]
    neighbours = by_column(evaluated("knn", run_folder, *sides, "--k", "1"))
    probes = by_column(evaluated("linear-probe", run_folder, *sides, "--c", "1"))
    by_column(evaluated("linear-probe", run_folder, *sides, "--shots", "1", "--c", "1"))
    for column in COLUMNS:
        assert neighbours[column]["results"][0]["top1"] == pytest.approx(twin.nearest(column))
        train, labels, test, expected = twin.parts(column)
        probe = LogisticRegression(C=1.0, max_iter=1000).fit(train, labels)
        assert probes[column]["top1"] == pytest.approx(probe.score(test, expected), abs=0.1)


def test_best_is_the_mean_of_columns_and_captions(run_folder, twin):
    values: dict[float, dict[str, float]] = {}
    for line in read_metrics(run_folder):
        values.setdefault(line["step"], {}).update(line)
    means = []
    for one in (values[2], values[4]):
        each = [one[f"zero_shot/held-out/top1/{column}"] for column in COLUMNS]
        assert one["zero_shot/held-out/top1"] == pytest.approx(np.mean(each))
        assert one["zero_shot/held-out/chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
        means.append(np.mean([*each, one["retrieval/held-out/recall_at_1"]]))
        assert one["evaluated/mean"] == pytest.approx(means[-1])
    assert each == pytest.approx([twin.zero_shot(column) for column in COLUMNS])
    best = json.loads((run_folder / "checkpoints" / "best.json").read_text())
    assert best["value"] == pytest.approx(max(means))
    assert mean_of_main(["zero_shot/a"], {"zero_shot/a/top1": 1.0}) == {}


def test_images_are_named_in_each_column(run_folder, twin, tmp_path, capsys):
    where = ["--checkpoint", run_folder, "--device", "cpu", "--top", "1"]
    where += ["--data", run_folder.parent / "shop" / "held-out"]
    call(evaluate, "classify", *where)
    lines = capsys.readouterr().out.splitlines()
    call(evaluate, "classify", *where, "--out", tmp_path / "answers.jsonl")
    answers = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    expected = zip(*(twin.names_of(column) for column in COLUMNS), strict=True)
    for answer, line, names in zip(answers, lines, expected, strict=True):
        assert [list(one) for one in answer["columns"].values()] == [[name] for name in names]
        for column, name in zip(answer["columns"], names, strict=True):
            assert f"{column} {name} " in line
