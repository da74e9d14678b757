"""The evaluation of a race, which belongs to neither side.

    python -m benchmarks.race.judge JOB.json RESULT.json

Pillow, torchvision and open_clip's tokenizer prepare the data, and a model encodes it in fp32.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from open_clip import SimpleTokenizer, create_model
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.config_json import config_from_dict
from unicl_fast.conversion.preprocessing import for_open_clip
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.evaluation.levels import classify_at_levels
from unicl_fast.training.data import distinct_names

from .contestants import register_open_clip_model

_Scores = dict[str, float]
_Encode = Callable[[Sequence[str]], Tensor]
"""Texts to unit features [n d]."""
_BATCH = 128
_RECALLS = (1, 10)
MOST_IMAGES_OF_RETRIEVAL = 1000
"""Recalls depend on the number of images that are searched."""
MOST_IMAGES_OF_PROBE = 10_000


@torch.no_grad()
def main(job_path: Path, result_path: Path) -> None:
    """Writes the scores of one model on all test sets, in percent."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    config = config_from_dict(job["config"])
    model = _load(job)
    tokenize = SimpleTokenizer(context_length=config.model.context_length)

    def encode(texts: Sequence[str]) -> Tensor:
        parts = (texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH))
        return F.normalize(torch.cat([model.encode_text(tokenize(part)) for part in parts]), dim=-1)

    scores: _Scores = {}
    for name, test in zip(distinct_names(job["test"]), job["test"], strict=True):
        with PackedDataset(test) as dataset:
            images = _encode_images(model, dataset, config)
            if dataset.manifest.num_labels and job["probe"]:
                scores |= _probe(name, model, config, dataset, images)
            if dataset.manifest.num_labels and config.objective.uses_texts:
                scores |= _classify(name, dataset, images, encode)
            if dataset.manifest.num_captions and config.objective.uses_texts:
                scores |= _retrieve(name, dataset, images, encode)
    result_path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def _load(job: dict[str, Any]) -> Any:
    """The model in evaluation mode, as its own side loads it."""
    if job["model"] is None:
        from unicl_fast import load_model

        return load_model(job["checkpoint"], device="cpu").encoders
    register_open_clip_model(Path(job["folder"]), job["model"])
    return create_model("race", job["checkpoint"], device="cpu").eval()


def _encode_images(
    model: Any, dataset: PackedDataset, config: TrainConfig, *, most: int = 10**9
) -> Tensor:
    """Unit features of the first images [n d]."""
    prepare, features = transform_of(config.data), []
    count = min(most, len(dataset))
    for start in range(0, count, _BATCH):
        indices = range(start, min(start + _BATCH, count))
        files = (BytesIO(dataset.image_bytes(index).tobytes()) for index in indices)
        images = torch.stack([prepare(Image.open(file)) for file in files])
        features.append(F.normalize(model.encode_image(images), dim=-1))
    return torch.cat(features)


def transform_of(data: DataConfig) -> Any:
    """A function from images to tensors [3 h w] as a model sees them; whole images by open_clip."""
    if isinstance(data.evaluation_resize, str):
        chosen = PreprocessCfg(size=data.image_size, **for_open_clip(data))
        return image_transform_v2(chosen, is_train=False)
    return v2.Compose(
        [
            v2.RGB(),
            v2.Resize(data.evaluation_resize, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(data.image_size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean, data.std),
        ]
    )


def _classify(name: str, dataset: PackedDataset, images: Tensor, encode: _Encode) -> _Scores:
    """Zero-shot top-1 of the images with one label; with a hierarchy also of all levels."""
    manifest = dataset.manifest

    def classifier_of(titles: Sequence[str]) -> Tensor:
        # the mean of the unit features of a class's prompts
        prompts = ([one.replace("{}", title) for one in manifest.templates] for title in titles)
        return torch.stack([F.normalize(encode(texts).mean(0), dim=0) for texts in prompts])

    labels = [dataset.labels_of(index).tolist() for index in range(len(dataset))]
    chosen = [index for index, of_image in enumerate(labels) if len(of_image) == 1]
    targets = torch.tensor([labels[index][0] for index in chosen])
    predicted = (images[chosen] @ classifier_of(manifest.class_names).T).argmax(dim=1)
    scores = {f"{name}/top1": _percent(predicted == targets)}
    if manifest.hierarchy is not None:
        found = classify_at_levels(
            images[chosen],
            classifier_of,
            labels=[labels[index] for index in chosen],
            class_names=manifest.class_names,
            hierarchy=manifest.hierarchy,
        ).to_json()
        levels = [100 * level["top1"] for level in found["levels"]]
        scores |= {f"{name}/level {depth} top1": score for depth, score in enumerate(levels)}
        scores[f"{name}/mean of levels"] = sum(levels) / len(levels)
        scores[f"{name}/levels off"] = found["distance_of_mistakes"]
    return scores


def _probe(
    name: str, model: Any, config: TrainConfig, dataset: PackedDataset, images: Tensor
) -> _Scores:
    """Accuracy of logistic regression on the features of the first training set."""
    from sklearn.linear_model import LogisticRegression

    with PackedDataset(config.data.train[0].partition("=")[0]) as train:
        features = _encode_images(model, train, config, most=MOST_IMAGES_OF_PROBE)
        targets = [int(train.labels_of(index)[0]) for index in range(len(features))]
    probe = LogisticRegression(max_iter=1000).fit(features.numpy(), targets)
    labels = torch.tensor([int(dataset.labels_of(index)[0]) for index in range(len(dataset))])
    predicted = torch.from_numpy(probe.predict(images.numpy()))
    return {f"{name}/probe": _percent(predicted == labels)}


def _retrieve(name: str, dataset: PackedDataset, images: Tensor, encode: _Encode) -> _Scores:
    """Recalls over the first images that have captions: an image by its caption, and back."""
    captioned = list(_captions(dataset))[:MOST_IMAGES_OF_RETRIEVAL]
    texts = sorted({caption for _, captions in captioned for caption in captions})
    # a caption that several images have finds any of them, and an image any of its captions
    is_pair = torch.tensor([[text in captions for _, captions in captioned] for text in texts])
    similarity = encode(texts) @ images[[index for index, _ in captioned]].T
    found = {}
    for k in _RECALLS:
        for what, scores, pairs in (
            ("image", similarity, is_pair),
            ("text", similarity.T, is_pair.T),
        ):
            nearest = scores.topk(min(k, scores.shape[1]), dim=1).indices
            found[f"{name}/{what} R@{k}"] = _percent(pairs.gather(1, nearest).any(dim=1))
    return found


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.float().mean())


def _captions(dataset: PackedDataset) -> Iterator[tuple[int, tuple[str, ...]]]:
    reader = SampleReader(dataset)
    for index in range(len(dataset)):
        if captions := reader.read_description(index).captions:
            yield index, captions
    reader.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
