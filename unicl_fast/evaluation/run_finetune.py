"""`unicl-eval finetune`: trains encoder and head on labels, then tests once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unicl_fast.augmentation import check_views
from unicl_fast.config import ObjectiveConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.classification import ClassificationResult, Metric, classify
from unicl_fast.evaluation.data import EvaluationData, check_data, open_data
from unicl_fast.evaluation.encode import (
    device_of,
    encode_images,
    prepare_images,
    require_text_encoder,
)
from unicl_fast.evaluation.figures import draw_confusion
from unicl_fast.evaluation.finetune import (
    FineTuned,
    FinetuneSettings,
    finetune,
    save_finetuned,
    zero_shot_head,
)
from unicl_fast.evaluation.linear_probe import (
    LinearClassifier,
    fit_probe,
    split_validation,
    with_labels,
)
from unicl_fast.evaluation.model import model_on_ranks, shows_progress
from unicl_fast.evaluation.report import classification_table, write_results
from unicl_fast.evaluation.requests import Finetune
from unicl_fast.evaluation.run_on_dataset import extract_all, loader_for
from unicl_fast.evaluation.zero_shot import zero_shot_classifier
from unicl_fast.models.precision import Precision, place_module
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.training.data import build_prompts


def check_finetune(command: Finetune) -> None:
    """Refuses what can be told to be wrong without a model.

    Raises:
        ValueError: a number out of range.
        FileNotFoundError: no data.
    """
    for spec in (command.train, command.data):
        check_data(spec)
    if not command.epochs > 0:
        raise ValueError(f"--epochs must be positive, not {command.epochs}")
    if command.train_batch_size < 1:
        raise ValueError(f"--train-batch-size must be at least 1, not {command.train_batch_size}")
    _settings(command, steps=1)
    if (command.out / "finetuned.json").exists():
        raise ValueError(f"{command.out} holds a fine-tuned model: name another folder as --out")


def run_finetune(command: Finetune) -> None:
    """Trains and tests on all ranks; rank 0 prints and writes."""
    with (
        model_on_ranks(command) as (model, ranks),
        open_data(command.train, ranks=ranks) as train,
        open_data(command.data, ranks=ranks) as test,
    ):
        config = _config(command, model.config, train.dataset)
        ranks.local_batch_size(config.run.global_batch_size)
        labels = _labels_in(test, train.class_names)
        precision = Precision(config.efficiency.precision)
        place_module(model, device=device_of(model), precision=precision)
        module = FineTuned(model, len(train.class_names))
        values: dict[str, Any] = {"head": command.head}
        if command.head != "fresh":
            module.set_head(_first_head(command, model, module, train, ranks))
            before = _test(model, module.eval(), test, labels, train.class_names, command, ranks)
            values["before"] = before.to_json()
        # steps from here on: the last batch of a pass may reach into the next pass
        steps = max(1, round(command.epochs * len(train.dataset) / config.run.global_batch_size))
        settings = _settings(command, steps=steps)
        loader = TrainLoader(
            config,
            [train.dataset],
            weights=None,
            prompts=build_prompts([train.dataset], config.data),
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=device_of(model),
        )
        trained = finetune(
            model,
            module,
            loader,
            labels_of=lambda sample: train.dataset.labels_of(sample).tolist(),
            settings=settings,
            ranks=ranks,
            progress=shows_progress(ranks),
        )
        result = _test(model, trained, test, labels, train.class_names, command, ranks)
        if not ranks.is_main:
            return
        metric: Metric = test.metric if command.metric == "auto" else command.metric
        if "before" in values:
            print(f"before, head from {command.head}: top-1 {100 * values['before']['top1']:.2f} %")
        print(result.to_table())
        save_finetuned(
            command.out, trained, config=config, class_names=train.class_names, settings=settings
        )
        print(f"written to {command.out}")
        if command.figures is not None:
            assert result.confusion is not None
            path = command.figures / "confusion-finetune.png"
            title = f"{test.name}, fine-tuned"
            draw_confusion(result.confusion, train.class_names, path, title=title)
            print(f"written to {path}")
        values = {
            "checkpoint": str(command.checkpoint),
            "weights": command.weights,
            "train": command.train,
            "data": command.data,
            "metric": metric,
            "settings": dataclasses.asdict(settings),
            "train_batch_size": command.train_batch_size,
            **values,
            **result.to_json(),
        }
        write_results(
            values,
            classification_table([(test.name, metric, result)]),
            json_path=command.json,
            markdown_path=command.markdown,
        )


def _settings(command: Finetune, *, steps: int) -> FinetuneSettings:
    names = {field.name for field in dataclasses.fields(FinetuneSettings)} - {"steps"}
    return FinetuneSettings(steps=steps, **{name: getattr(command, name) for name in names})


def _config(command: Finetune, config: TrainConfig, dataset: PackedDataset) -> TrainConfig:
    """The checkpoint's config with the data and batches of this training.

    Raises:
        ValueError: images in two views, of which one would be for nothing.
    """
    data = dataclasses.replace(
        config.data,
        train=(str(dataset.folder),),
        fraction=(1.0,),
        evaluate=(),
        text="labels",
        augment=config.data.augment if command.augment is None else tuple(command.augment.split()),
        max_bad_fraction=0.0,
    )
    objective = ObjectiveConfig()  # whatever the checkpoint was trained by
    check_views(data.augment, objective=objective.name)
    run = dataclasses.replace(
        config.run, global_batch_size=command.train_batch_size, seed=command.seed
    )
    return dataclasses.replace(config, data=data, run=run, objective=objective)


def _labels_in(data: EvaluationData, names: Sequence[str]) -> list[list[int]]:
    """Labels of all samples as places among other class names.

    Raises:
        ValueError: a class that is not among them.
    """
    places = {name: place for place, name in enumerate(names)}
    strangers = [name for name in data.class_names if name not in places]
    if strangers:
        raise ValueError(
            f"{data.name} has the class {strangers[0]!r}, which the training data has not: pack "
            "both with the same --class-names"
        )
    table = [places[name] for name in data.class_names]
    return [
        [table[label] for label in data.dataset.labels_of(sample).tolist()]
        for sample in range(len(data.dataset))
    ]


def _first_head(
    command: Finetune, model: UniCL, module: FineTuned, train: EvaluationData, ranks: Ranks
) -> LinearClassifier:
    """The head to begin with, the same on all ranks."""
    device = device_of(model)
    if command.head == "zero-shot":
        require_text_encoder(model, "finetune --head zero-shot")
        classifier = zero_shot_classifier(
            model,
            class_names=train.class_names,
            templates=train.templates,
            progress=shows_progress(ranks),
        )
        # the same images on all ranks, which begin with the same head
        loader = loader_for(model, train.dataset, ranks=Ranks(), batch_size=command.batch_size)
        first = next(iter(loader))
        return zero_shot_head(
            model, classifier, encode_images(model, first.images, layer="encoder")
        )
    features = extract_all(
        model,
        train.dataset,
        layer="encoder",
        ranks=ranks,
        batch_size=command.batch_size,
        progress=shows_progress(ranks),
    )
    weight = torch.zeros_like(module.head.weight)
    bias = torch.zeros_like(module.head.bias)
    if features is not None:
        labels = [train.dataset.labels_of(i).tolist() for i in range(len(train.dataset))]
        samples = with_labels(features.to(device), labels, what=command.train)
        kept, aside = split_validation(
            samples.labels.cpu().numpy(), fraction=0.2, seed=command.seed
        )
        fit = fit_probe(samples.take(kept), samples.take(aside), class_names=train.class_names)
        weight.copy_(fit.classifier.weight)
        bias.copy_(fit.classifier.bias)
    if ranks.world_size > 1:
        torch.distributed.broadcast(weight, src=0)
        torch.distributed.broadcast(bias, src=0)
    return LinearClassifier(weight, bias)


def _test(
    model: UniCL,
    module: FineTuned,
    test: EvaluationData,
    labels: Sequence[Sequence[int]],
    names: Sequence[str],
    command: Finetune,
    ranks: Ranks,
) -> ClassificationResult:
    loader = loader_for(model, test.dataset, ranks=ranks, batch_size=command.batch_size)
    precision = Precision(model.config.efficiency.precision)

    def scores_of(images: Tensor) -> Tensor:
        normalised = prepare_images(model, images)
        with precision.autocast(normalised.device.type):
            return module(normalised)

    return classify(
        loader,
        scores_of,
        labels_of=lambda sample: labels[sample],
        class_names=names,
        what="fine-tuning",
        ranks=ranks,
        num_batches=len(loader) if shows_progress(ranks) else None,
        confusion=command.figures is not None,
    )
