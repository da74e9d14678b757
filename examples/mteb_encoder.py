"""mteb evaluates a model of ours: a run, an export, or any other that `load_model` reads.

pip install mteb
python examples/mteb_encoder.py runs/first OxfordPetsZeroShot Flickr30kT2IRetrieval
"""

import sys

import mteb
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from torch.nn import functional as F

from unicl_fast import load_model


class Encoder(AbsEncoder):
    """Unit-norm features of images or texts; of an input with both, of their sum."""

    def __init__(self, path, *, name="unicl_fast/model", device="auto"):
        self.model = load_model(path, device=device)
        facts = {"name": name, "revision": "1", "modalities": ["image", "text"]}
        facts["similarity_fn_name"] = ScoringFunction.COSINE
        self.mteb_model_meta = ModelMeta.create_empty(facts)

    def encode(self, inputs, **_):
        rows = []
        for batch in inputs:
            parts = []
            if "image" in batch:
                parts.append(self.model.embed_images(batch["image"], progress=False))
            if "text" in batch:
                parts.append(self.model.embed_texts(batch["text"], progress=False))
            rows.append(F.normalize(sum(map(torch.from_numpy, parts)), dim=-1))
        return torch.cat(rows)


if __name__ == "__main__":
    found = mteb.evaluate(Encoder(sys.argv[1]), mteb.get_tasks(tasks=sys.argv[2:]), cache=None)
    for result in found.task_results:
        print(f"{result.task_name}: {result.get_score():.4f}")
