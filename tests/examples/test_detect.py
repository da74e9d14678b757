"""examples/detect: an exported encoder in torchvision's detector, on objects of known boxes."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from small_runs import tiny_config
from torch import Tensor, nn

from unicl_fast import UniCL
from unicl_fast.checkpoints.load import build_model
from unicl_fast.conversion.libraries import write_timm

pytest.importorskip("pycocotools")

BOXES = ([(4, 8, 24)], [(30, 20, 28)], [(10, 30, 30)], [(2, 2, 20), (36, 34, 26)])
"""Left, top and side of the objects in each image, in pixels."""


@pytest.fixture(scope="module")
def detect() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "detect"))
    try:
        import detect
    finally:
        sys.path.pop(0)
    return detect


@pytest.fixture(scope="module")
def pasted(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file of annotations as COCO's, and the folder of its images.

    In three photographs of 64 pixels others are pasted, a kind of object each, and in a fourth two.
    """
    folder = tmp_path_factory.mktemp("objects")
    listed, annotations = [], []
    for number, boxes in enumerate(BOXES):
        canvas = Image.fromarray(images[number].numpy()).resize((64, 64))
        for kind, (x, y, size) in enumerate(boxes, start=number % 3):
            canvas.paste(Image.fromarray(images[4 + kind].numpy()).resize((size, size)), (x, y))
            corners = [x, y, x + size, y, x + size, y + size, x, y + size]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 10 * (kind + 1),
                 "bbox": [x, y, size, size], "area": size * size, "iscrowd": 0,
                 "segmentation": [corners]}
            )  # fmt: skip
        canvas.save(folder / f"{number}.png")
        listed.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
    categories = [{"id": number, "name": str(number)} for number in (10, 20, 30)]
    content = {"images": listed, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return [folder / "instances.json", folder]


def exported(folder: Path, encoder: str) -> UniCL:
    config = tiny_config(image_encoder=encoder, precision="fp32")
    model = build_model(config.changed(model={"drop_path": 0.0})).eval()
    write_timm(model, folder)
    return model


class Known(nn.Module):
    """A detector that knows the objects of the images that come in turn."""

    def __init__(self, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.targets = iter(targets)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        target = next(self.targets)
        return [{**target, "scores": torch.ones(len(target["labels"]))}]


def test_right_objects_have_precision_100_and_wrong_ones_less(detect, pasted, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_: torch.ones(()))  # flips none
    known = [target for _, target in detect.TrainImages(*pasted, masks=True)]
    data = detect.TestImages(*pasted)

    def found(shift: int) -> dict[str, float]:
        targets = [
            {**one, "boxes": one["boxes"] + shift, "masks": one["masks"][:, None].roll(shift, -1)}
            for one in known
        ]
        return detect.evaluate(Known(targets), data, masks=True)

    right, wrong = found(0), found(4)
    for name in ("bbox AP", "segm AP", "bbox AP75", "segm AP75"):
        assert right[name] == pytest.approx(100)
        assert wrong[name] < 60
    nothing = {name: tensor[:0] for name, tensor in known[0].items()}
    assert detect.evaluate(Known([nothing] * len(data)), data)["bbox AP"] == 0


def test_a_flip_moves_boxes_and_masks_with_their_pixels(detect, pasted, monkeypatch):
    data = detect.TrainImages(*pasted, masks=True)
    assert len(data) == 4
    seen = []
    for chance in (1.0, 0.0):
        monkeypatch.setattr(torch, "rand", lambda *_, chance=chance: torch.tensor(chance))
        seen.append(data[0])
    (image, target), (flipped, moved) = seen
    for before, after in zip(target["boxes"].int(), moved["boxes"].int(), strict=True):
        (a, b, c, d), (left, top, right, bottom) = before.tolist(), after.tolist()
        assert torch.equal(image[:, b:d, a:c], flipped[:, top:bottom, left:right].flip(-1))
    for box, mask in zip(moved["boxes"].int().tolist(), moved["masks"], strict=True):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].float().mean() > 0.9
        assert mask.sum() == mask[top:bottom, left:right].sum()


def test_crowds_and_boxes_without_area_are_not_learned(detect):
    rows = [{"bbox": [0, 0, 2, 2]}, {"bbox": [0, 0, 2, 0]}, {"bbox": [0, 0, 2, 2], "iscrowd": 1}]
    assert detect.objects_among(rows) == rows[:1]


def test_the_pyramid_stands_on_the_exported_encoder(detect, tmp_path):
    model = exported(tmp_path / "resnet", "resnet10t")
    backbone = detect.Pyramid(tmp_path / "resnet").eval()
    assert backbone.strides == [4, 8, 16, 32]
    images = torch.randn(1, 3, 64, 96)
    expected = model.image_encoder(images)
    torch.testing.assert_close(backbone.encoder(images)[-1].mean((2, 3)), expected)
    assert [one.shape[1:] for one in backbone(images).values()] == [
        (256, 16, 24), (256, 8, 12), (256, 4, 6), (256, 2, 3), (256, 1, 2),
    ]  # fmt: skip
    assert not [name for name, _ in backbone.encoder.named_parameters() if ".bn" in name]
    exported(tmp_path / "vit", "test_vit")
    with pytest.raises(SystemExit, match="test_vit has maps of strides .*: take ResNet"):
        detect.Pyramid(tmp_path / "vit")


@pytest.mark.long
def test_a_detector_is_trained_and_its_figures_written(detect, pasted, tmp_path, monkeypatch):
    exported(tmp_path / "backbone", "resnet10t")
    sets = ["--train", pasted[0], "--train-images", pasted[1], "--test", pasted[0]]
    sets += ["--test-images", pasted[1], "--backbone", tmp_path / "backbone", "--out", tmp_path]
    small = ["--min-size", "64", "--max-size", "64", "--boxes-per-image", "32", "--workers", "0"]
    small += ["--batch-size", "4", "--epochs", "25", "--lr", "1e-3", "--warmup-steps", "5"]
    monkeypatch.setattr(sys, "argv", ["detect.py", *map(str, sets), *small, "--masks"])
    detect.main()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["bbox AP50"] > 30
    assert metrics["segm AP50"] > 30
    assert (tmp_path / "detector.safetensors").is_file()
