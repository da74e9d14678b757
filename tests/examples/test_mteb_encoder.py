"""The adapter for mteb gives there what `unicl-eval` gives here."""

import io
from typing import Any

import pytest
from PIL import Image
from program_runs import SMALL, call, evaluated

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.text.class_lists import fill_template
from unicl_fast.tools import pretrain

FACTS: dict[str, Any] = {
    **dict.fromkeys(("reference", "date", "domains", "task_subtypes", "license", "dialect")),
    **dict.fromkeys(("annotations_creators", "sample_creation", "bibtex_citation")),
    **{"name": "Local", "description": "local", "dataset": {"path": "none", "revision": "1"}},
    **{"type": "ZeroShotClassification", "category": "i2t", "modalities": ["image", "text"]},
    **{"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "main_score": "accuracy"},
}


@pytest.mark.slow  # mteb imports for seconds
@pytest.mark.dali
def test_mteb_finds_the_accuracy_of_our_own_zero_shot(data, tmp_path):
    mteb = pytest.importorskip("mteb", reason="pip install mteb")
    import datasets
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    from examples.mteb_encoder import Encoder

    class Local(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(**FACTS)

        def load_data(self, **_: Any) -> None:
            with PackedDataset(data / "labels") as own:
                samples = range(len(own))
                images = [Image.open(io.BytesIO(own.image_bytes(number))) for number in samples]
                labels = [int(own.labels_of(number)[0]) for number in samples]
                template, names = own.manifest.templates[0], own.manifest.class_names
            self.prompts = [fill_template(template, name) for name in names]
            rows = datasets.Dataset.from_dict({"image": images, "label": labels})
            kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
            self.dataset = datasets.DatasetDict(test=rows.cast(kinds))
            self.data_loaded = True

        def get_candidate_labels(self) -> list[str]:
            return self.prompts

    call(pretrain, *SMALL, "--data.train", data / "labels", "--out", tmp_path / "run",
         "--run.steps", "4")  # fmt: skip
    encoder = Encoder(tmp_path / "run", device="cpu")
    found = mteb.evaluate(encoder, Local(), cache=None, show_progress_bar=False)
    own = evaluated("zero-shot", tmp_path / "run", "--data", data / "labels")
    assert found.task_results[0].get_score() == pytest.approx(own["top1"])
