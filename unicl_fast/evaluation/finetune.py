"""Fine-tuning: the image encoder and a linear head trained together on labels.

timm's recipe: AdamW with a learning rate that decays with depth, warm-up and cosine, label
smoothing, mixup and CutMix, an average of the weights. The last average is evaluated, never
the best of several on the test images. The trainer of `unicl_fast.training.trainer` compares images
with texts; this loop is small and its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from timm.data import Mixup
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from unicl_fast.augmentation import check_views
from unicl_fast.batch import Batch, Loader
from unicl_fast.checkpoints.files import save_tensors
from unicl_fast.checkpoints.load import read_tensors
from unicl_fast.config import ObjectiveConfig, TrainConfig, config_from_dict, config_to_dict
from unicl_fast.distributed.ranks import Ranks, gather_integers, rank_0_alone
from unicl_fast.evaluation.data import EvaluationData, open_data
from unicl_fast.evaluation.features import (
    ModelOnRanks,
    device_of,
    encode_images,
    model_on_ranks,
    prepare_images,
    with_labels,
)
from unicl_fast.evaluation.probes import LinearClassifier, fit_probe, hold_out
from unicl_fast.evaluation.report import (
    ClassificationResult,
    classification_table,
    draw_confusion,
    write_results,
)
from unicl_fast.evaluation.requests import Finetune, FinetuneRecipe, Metric
from unicl_fast.evaluation.zero_shot import zero_shot_classifier
from unicl_fast.models.efficiency import keep_activations_in_copy
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.precision import Precision, place_module
from unicl_fast.models.unicl import UniCL, project
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.training.data import build_prompts, with_threads
from unicl_fast.training.limits import count_replaced
from unicl_fast.training.optim import groups_by_depth

_WEIGHTS_FILE = "finetuned.safetensors"
_DESCRIPTION_FILE = "finetuned.json"


class FineTuned(nn.Module):
    """An image encoder under a linear head."""

    def __init__(self, model: UniCL, num_classes: int) -> None:
        """Takes the encoder of a model, not a copy, and a head of zeros."""
        super().__init__()
        self.encoder = model.image_encoder
        self.head = nn.Linear(feature_width(model.image_encoder), num_classes)
        self.head.to(next(self.encoder.parameters()))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits [b k] of normalised images."""
        logits: Tensor = self.head(self.encoder(images))
        return logits

    @torch.no_grad()
    def set_head(self, classifier: LinearClassifier) -> None:
        """Begins with a fitted classifier, such as a linear probe's."""
        self.head.weight.copy_(classifier.weight)
        self.head.bias.copy_(classifier.bias)


@torch.no_grad()
def zero_shot_head(
    model: UniCL, classifier: Float[Tensor, "k d"], features: Float[Tensor, "n w"]
) -> LinearClassifier:
    """A head on the encoder's features that ranks classes as zero-shot classification does.

    Zero-shot scores are s (x P) . t / |x P|, for features x, the unit-norm t of a class, and the
    model's projection P, which may have a bias, and scale s. A linear head cannot divide by an
    image's own norm, which changes no ranking; it divides by the mean norm, so that probabilities
    begin near the model's.
    """
    projection, bias = (
        None if one is None else one.to(features.dtype)
        for one in (model.image_projection, model.image_projection_bias)
    )
    features = features.to(model.logit_scale.device)
    norm = project(features, projection, bias).norm(dim=1).mean()
    weight = classifier.to(features) * (model.logit_scale.exp() / norm)
    offset = weight.new_zeros(len(weight)) if bias is None else weight @ bias
    return LinearClassifier(weight if projection is None else weight @ projection.T, offset)


def build_optimizer(module: FineTuned, recipe: FinetuneRecipe) -> torch.optim.Optimizer:
    """AdamW over groups by depth; the head is one layer above the encoder's last."""
    spared = getattr(module.encoder, "no_weight_decay", set)
    groups = groups_by_depth(
        module.encoder,
        layer_decay=recipe.layer_decay,
        weight_decay=recipe.weight_decay,
        spared=set(cast(Any, spared)()),
    )
    groups += [
        {"params": [module.head.weight], "lr_scale": 1.0, "weight_decay": recipe.weight_decay},
        {"params": [module.head.bias], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def finetune(
    model: UniCL,
    module: FineTuned,
    loader: Loader,
    recipe: FinetuneRecipe,
    *,
    steps: int,
    labels_of: Callable[[int], Sequence[int]],
    ranks: Ranks | None = None,
    progress: bool = False,
) -> FineTuned:
    """Trains encoder and head in place.

    Args:
        model: decides how images are normalised, and the precision.
        module: the model's encoder and a head.
        loader: local batches of labelled images. Mixup mixes within a local batch.
        recipe: the settings.
        steps: updates of the weights.
        labels_of: labels of a sample, of which the first is the target.
        ranks: they share each batch.
        progress: show a progress bar.

    Returns:
        The network to evaluate, in evaluation mode: the average of the weights, or `module`.

    Raises:
        ValueError: a sample without a label, an image that cannot be read, or a loss that is not
            finite.
    """
    ranks = ranks or Ranks()
    device = next(module.parameters()).device
    precision = Precision(model.config.efficiency.precision)
    scaler = precision.build_scaler(device.type)
    optimizer = build_optimizer(module, recipe)
    schedule = _cosine_schedule(optimizer, recipe, steps=steps)
    average = None
    if recipe.ema_decay:
        average = ModelEmaV3(module, decay=recipe.ema_decay, use_warmup=True)
        keep_activations_in_copy(average.module)
    forward = DistributedDataParallel(module) if ranks.world_size > 1 else module
    module.train()
    if model.drop_path_key.tokens is not None:
        model.drop_path_key.tokens.part = 0.0  # what the run left out was for its own speed
    batches = loader.batches(0)
    replaced = 0
    bar = tqdm(range(steps), desc="fine-tune", disable=not progress)
    for step in bar:
        batch = next(batches)
        replaced += count_replaced(batch)
        target = _first_labels(batch, labels_of).to(device)
        images = prepare_images(model, batch.images)
        smoothing = recipe.label_smoothing
        if recipe.mixup or recipe.cutmix:
            images, target = _mixed(images, target, recipe, module.head.out_features, step=step)
            smoothing = 0.0  # it is in the target
        model.set_drop_path_key(step=step, global_index=batch.global_index.to(device))
        schedule.step_update(step + 1)
        with precision.autocast(device.type):
            logits = forward(images)
        logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
        loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if average is not None:
            average.update(module, step=step + 1)
        if step % 10 == 0 or step + 1 == steps:
            if any(gather_integers(replaced, ranks)):
                raise ValueError(
                    "images of the training data cannot be read or decoded, and the log names "
                    "them: pack them again, since fine-tuning takes all or none"
                )
            value = float(loss.detach())
            if not np.isfinite(value):
                raise ValueError(f"the loss is not finite in step {step}: take a smaller --lr")
            bar.set_postfix_str(f"loss {value:.3f}")
    loader.close()
    result = module if average is None else cast(FineTuned, average.module)
    if ranks.world_size > 1:  # BatchNorm's averages are those of each local batch: take rank 0's
        for buffer in result.buffers():
            torch.distributed.broadcast(buffer, src=0)
    return result.eval()


def _cosine_schedule(
    optimizer: torch.optim.Optimizer, recipe: FinetuneRecipe, *, steps: int
) -> CosineLRScheduler:
    warmup = round(recipe.warmup_fraction * steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps - warmup),
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _mixed(
    images: Tensor, labels: Tensor, recipe: FinetuneRecipe, num_classes: int, *, step: int
) -> tuple[Tensor, Tensor]:
    """Mixed images and their targets [b k], fp32."""
    if len(images) % 2:
        raise ValueError(
            f"timm's mixup takes images in pairs, and a local batch has {len(images)}: make it "
            "even, or set mixup and cutmix to 0"
        )
    mix = Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=recipe.label_smoothing,
        num_classes=num_classes,
    )
    # timm draws from NumPy's legacy stream, which NumPy keeps as it is; the same on all ranks
    np.random.seed([recipe.seed, step])
    images, target = mix(images, labels)
    return images, target.to(images.device, torch.float32)


def _first_labels(batch: Batch, labels_of: Callable[[int], Sequence[int]]) -> Tensor:
    assert batch.sample_ids is not None
    samples = batch.sample_ids.tolist()
    found = [labels_of(sample) for sample in samples]
    without = [sample for sample, labels in zip(samples, found, strict=True) if not len(labels)]
    if without:
        raise ValueError(
            f"sample {without[0]} of the training images has no label: fine-tuning takes data "
            "sets in which all have one"
        )
    return torch.tensor([int(labels[0]) for labels in found])


def save_finetuned(
    folder: Path,
    module: FineTuned,
    *,
    config: TrainConfig,
    class_names: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """Writes the weights, and their description, into a folder."""
    make_folder(folder)
    tensors = {name: value.cpu().contiguous() for name, value in module.state_dict().items()}
    save_tensors(tensors, folder / _WEIGHTS_FILE)
    description = {"config": config_to_dict(config), "class_names": class_names}
    text = json.dumps(description | {"settings": settings}, indent=1)
    (folder / _DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")


def load_finetuned(folder: str | Path) -> tuple[FineTuned, tuple[str, ...]]:
    """A fine-tuned classifier in evaluation mode on the CPU, and its class names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the files are damaged.
    """
    path = Path(folder) / _DESCRIPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {_DESCRIPTION_FILE}, as unicl-eval finetune makes"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        config = config_from_dict(description["config"])
        names = tuple(description["class_names"])
        model = UniCL(config).to(Precision(config.efficiency.precision).weight_type)
        module = FineTuned(model, len(names))
        module.load_state_dict(read_tensors(Path(folder) / _WEIGHTS_FILE))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    return module.eval(), names


def run(command: Finetune) -> None:
    """Trains and tests on all ranks; rank 0 prints and writes."""
    from unicl_fast.pipelines.loader import TrainLoader  # it needs DALI

    with (
        model_on_ranks(command) as on_ranks,
        open_data(command.train, ranks=on_ranks.ranks) as train,
        open_data(command.data, ranks=on_ranks.ranks, metric=command.metric) as test,
    ):
        model, ranks = on_ranks.model, on_ranks.ranks
        config = _config(command, model.config, train)
        ranks.local_batch_size(command.train_batch_size)
        labels = test.labels_among(train)
        names = train.class_names
        place_module(
            model, device=device_of(model), precision=Precision(config.efficiency.precision)
        )
        module = FineTuned(model, len(names))

        def tested(module: FineTuned) -> ClassificationResult:
            return on_ranks.classify(
                on_ranks.loader(test.dataset),
                lambda images: _scores(model, module, images),
                labels_of=lambda sample: labels[sample],
                class_names=names,
                what="fine-tuning",
                confusion=command.figures is not None,
            )

        before: dict[str, Any] = {"head": command.head}
        if command.head != "fresh":
            _begin_head(command, on_ranks, module, train, metric=test.metric)
            before["before"] = tested(module.eval()).to_json()
        # in steps from here on: the last batch of an epoch may reach into the next epoch
        steps = max(1, round(command.epochs * len(train.dataset) / command.train_batch_size))
        trained = finetune(
            model,
            module,
            TrainLoader(
                dataclasses.replace(config, data=with_threads(config.data, ranks)),
                [train.dataset],
                weights=None,
                prompts=build_prompts([train.dataset], config),
                rank=ranks.rank,
                world_size=ranks.world_size,
                device=device_of(model),
            ),
            command,
            steps=steps,
            labels_of=lambda sample: train.dataset.labels_of(sample).tolist(),
            ranks=ranks,
            progress=on_ranks.progress,
        )
        result = tested(trained)
    if not ranks.is_main:
        return
    if "before" in before:
        print(f"before, head from {command.head}: top-1 {100 * before['before']['top1']:.2f} %")
    print(result.to_table())
    recipe = {f.name: getattr(command, f.name) for f in dataclasses.fields(FinetuneRecipe)}
    settings = {"steps": steps, **recipe}
    save_finetuned(command.out, trained, config=config, class_names=names, settings=settings)
    print(f"written to {command.out}")
    values = {
        "train": command.train,
        "data": command.data,
        "name": test.name,
        "metric": test.metric,
        "settings": settings,
        "train_batch_size": command.train_batch_size,
        **before,
        **result.to_json(),
    }
    write_results(command, values, classification_table([(test.name, test.metric, result)]))
    draw_confusion(result, names, command.figures, "finetune", title=f"{test.name}, fine-tuned")


def _config(command: Finetune, config: TrainConfig, train: EvaluationData) -> TrainConfig:
    """The checkpoint's config with the data and batches of this training."""
    data = dataclasses.replace(
        config.data,
        train=(train.dataset.location,),
        fraction=(1.0,),
        evaluate=(),
        text="labels",
        prompts="labels",
        balance=0,
        balance_concepts="",
        augment=config.data.augment if command.augment is None else tuple(command.augment.split()),
    )
    objective = ObjectiveConfig()  # whatever the checkpoint was trained by
    # images in two views, of which one would be for nothing, are refused
    check_views(data.augment, objective=objective.name)
    run = dataclasses.replace(
        config.run, global_batch_size=command.train_batch_size, seed=command.seed, stages=()
    )
    return dataclasses.replace(config, data=data, run=run, objective=objective)


def _begin_head(
    command: Finetune,
    on_ranks: ModelOnRanks,
    module: FineTuned,
    train: EvaluationData,
    *,
    metric: Metric,
) -> None:
    """Sets the head to begin with, the same on all ranks."""
    model = on_ranks.model
    if command.head == "zero-shot":
        classifier = zero_shot_classifier(
            model,
            class_names=train.class_names,
            templates=train.templates,
            progress=on_ranks.progress,
        )
        # the same images on all ranks, which begin with the same head
        alone = dataclasses.replace(on_ranks, ranks=Ranks(cores=on_ranks.ranks.cores))
        first = next(iter(alone.loader(train.dataset)))
        shown = encode_images(model, first.images, layer="encoder")
        module.set_head(zero_shot_head(model, classifier, shown))
        return
    features = on_ranks.features(train.dataset, layer="encoder")
    with rank_0_alone(on_ranks.ranks):
        if features is not None:
            samples = with_labels(features.to(device_of(model)), train.labels(), what=command.train)
            kept, aside = hold_out(samples, fraction=0.2, seed=command.seed)
            fit = fit_probe(
                kept, aside, class_names=train.class_names, metric=metric, seed=command.seed
            )
            module.set_head(fit.classifier)
    if on_ranks.ranks.world_size > 1:
        for parameter in module.head.parameters():
            torch.distributed.broadcast(parameter.detach(), src=0)


def _scores(model: UniCL, module: FineTuned, images: Tensor) -> Tensor:
    """Scores [b k] of images uint8 [b h w c]."""
    normalised = prepare_images(model, images)
    with Precision(model.config.efficiency.precision).autocast(normalised.device.type):
        scores: Tensor = module(normalised)
    return scores
