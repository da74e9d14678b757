"""Trains by sentence-transformers' own trainer, as a job of `race.py` says."""

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any], folder: Path) -> None:
    """Trains on (image, text) rows, and writes the model into `folder`/model."""
    import sentence_transformers as theirs
    from datasets import Dataset, Image
    from sentence_transformers.sentence_transformer import losses
    from torchvision.transforms import v2

    model = theirs.SentenceTransformer(job["start"], device="cpu")
    rows = Dataset.from_csv(job["rows"], delimiter="\t", cache_dir=str(folder / "rows"))
    crop = v2.Compose([v2.RGB(), v2.RandomResizedCrop(**job["crop"])])
    decode = Image().decode_example

    def prepare(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        images = [crop(decode({"path": path, "bytes": None})) for path in batch["filepath"]]
        return {"filepath": images, "title": batch["title"]}  # a sampler needs the columns' names

    name, *settings = job["loss"]
    named = {key: json.loads(value) for key, _, value in (one.partition("=") for one in settings)}
    own = {key: named.pop(key) for key in ("batch_sampler",) if key in named}
    theirs.SentenceTransformerTrainer(
        model,
        theirs.SentenceTransformerTrainingArguments(str(folder / "out"), **job["arguments"], **own),
        train_dataset=rows.with_transform(prepare),
        loss=getattr(losses, name)(model, **named),
    ).train()
    model.save_pretrained(str(folder / "model"))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[1]).parent)
