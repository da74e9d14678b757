"""`unicl-eval detect`: trains a detector over the encoder and takes COCO's metrics."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from unicl_fast.distributed.ranks import gather_objects
from unicl_fast.evaluation.detection import (
    DetectionSettings,
    build_detector,
    detect,
    train_detector,
)
from unicl_fast.evaluation.detection_data import (
    METRICS,
    CocoImages,
    as_coco,
    coco_metrics,
    require_pycocotools,
    training_batches,
)
from unicl_fast.evaluation.encode import device_of
from unicl_fast.evaluation.model import model_on_ranks, shows_progress
from unicl_fast.evaluation.report import markdown_table, percent, write_results
from unicl_fast.evaluation.requests import Detect

WEIGHTS_FILE = "detector.safetensors"
DESCRIPTION_FILE = "detector.json"


def check_detect(command: Detect) -> None:
    """Refuses what can be told to be wrong without a model.

    Raises:
        ValueError: a number out of range, or no list of boxes.
        FileNotFoundError: no annotations or images.
        ModuleNotFoundError: pycocotools is missing.
    """
    require_pycocotools()
    for name in ("epochs", "train_batch_size", "min_size", "boxes_per_image", "lr"):
        if not getattr(command, name) > 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be positive, not {getattr(command, name)}")
    if command.max_size < command.min_size:
        raise ValueError(
            f"--max-size ({command.max_size}) must not be below --min-size ({command.min_size})"
        )
    if command.workers < 0 or command.warmup_steps < 0:
        raise ValueError("--workers and --warmup-steps must not be negative")
    train = CocoImages(command.train, command.train_images)
    test = CocoImages(command.data, command.images)
    if train.class_names != test.class_names:
        raise ValueError(
            f"{command.train} and {command.data} list different categories: a detector needs the "
            "same ones, in the same order of ids"
        )
    if (command.out / DESCRIPTION_FILE).exists():
        raise ValueError(f"{command.out} holds a detector: name another folder as --out")


def run_detect(command: Detect) -> None:
    """Trains and tests on all ranks; rank 0 prints and writes."""
    with model_on_ranks(command) as (model, ranks):
        share = ranks.local_batch_size(command.train_batch_size)
        train = CocoImages(command.train, command.train_images, masks=command.masks)
        test = CocoImages(command.data, command.images)
        # fresh heads, and the proposals that are drawn in training
        torch.manual_seed(command.seed)
        detector = build_detector(
            model,
            num_classes=len(train.class_names),
            masks=command.masks,
            min_size=command.min_size,
            max_size=command.max_size,
            boxes_per_image=command.boxes_per_image,
        ).to(device_of(model))
        torch.manual_seed(command.seed + ranks.rank)
        steps = max(1, round(command.epochs * len(train.with_boxes) / command.train_batch_size))
        settings = DetectionSettings(
            steps=steps,
            optimizer=command.optimizer,
            lr=command.lr,
            warmup_steps=command.warmup_steps,
        )
        if ranks.is_main:
            print(
                f"{len(train.with_boxes):,} images with boxes, {len(train.class_names)} classes, "
                f"{steps:,} steps of {command.train_batch_size} ({share} a rank)"
            )
        batches = training_batches(
            train,
            batch_size=command.train_batch_size,
            seed=command.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=command.workers,
        )
        train_detector(detector, batches, settings, ranks=ranks, progress=shows_progress(ranks))
        places = range(ranks.rank, len(test), ranks.world_size)
        images = ((test.images[place]["id"], test[place][0]) for place in places)
        own: list[dict[str, Any]] = []
        for number, found in tqdm(
            detect(detector, images),
            desc="detect",
            total=len(places),
            disable=not shows_progress(ranks),
        ):
            own += as_coco(number, found, test.category_ids)
        detections = [row for part in gather_objects(own, ranks) for row in part]
        if not ranks.is_main:
            return
        metrics = coco_metrics(test.content, detections, masks=command.masks)
        kinds = ["box", "mask"] if command.masks else ["box"]
        rows = [[kind, *(_shown(metrics[f"{kind}/{name}"]) for name in METRICS)] for kind in kinds]
        table = markdown_table(["%", *METRICS], rows)
        print(table)
        command.out.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in detector.state_dict().items()}
        save_file(tensors, command.out / WEIGHTS_FILE)
        values = {
            "checkpoint": str(command.checkpoint),
            "weights": command.weights,
            "image_encoder": model.config.model.image_encoder,
            "train": str(command.train),
            "data": str(command.data),
            "num_train": len(train.with_boxes),
            "num_test": len(test),
            "masks": command.masks,
            "min_size": command.min_size,
            "max_size": command.max_size,
            "boxes_per_image": command.boxes_per_image,
            "train_batch_size": command.train_batch_size,
            "class_names": list(train.class_names),
            "settings": dataclasses.asdict(settings),
            **metrics,
        }
        (command.out / DESCRIPTION_FILE).write_text(json.dumps(values, indent=1) + "\n")
        (command.out / "detections.json").write_text(json.dumps(detections) + "\n")
        print(f"written to {command.out}")
        write_results(values, table, json_path=command.json, markdown_path=command.markdown)


def _shown(value: float) -> str:
    return "none" if value < 0 else percent(value)
