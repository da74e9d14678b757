"""Fine-tuning: the image encoder and a fresh linear head trained together on labels.

timm's recipe: AdamW with a learning rate that decays with depth, warm-up and cosine, label
smoothing, mixup and CutMix, an average of the weights. What is evaluated is the last average, never
the best of several on the test images. The trainer of `unicl_fast.training.trainer` compares images
with texts; this loop is small and its own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from timm.optim import param_groups_layer_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from unicl_fast.batch import Loader
from unicl_fast.config import TrainConfig, config_from_dict, config_to_dict
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.encode import prepare_images
from unicl_fast.evaluation.linear_probe import LinearClassifier
from unicl_fast.models.activation_checkpointing import undo_in_copy
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.precision import Precision
from unicl_fast.models.unicl import UniCL

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "finetuned.safetensors"
DESCRIPTION_FILE = "finetuned.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """timm's recipe."""

    steps: int
    """Updates of the weights."""
    lr: float = 5e-4
    """Peak learning rate of the head; a layer d below it has lr * layer_decay ** d."""
    layer_decay: float = 0.75
    """1 trains all layers at the same rate."""
    weight_decay: float = 0.05
    """Decoupled; none on 1-D parameters and those that timm's model spares."""
    warmup_fraction: float = 0.1
    """Part of the steps during which the rate climbs from 0."""
    label_smoothing: float = 0.1
    """Part of the target that is spread over all classes."""
    mixup: float = 0.2
    """Alpha of mixup's Beta distribution; 0 does none."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 does none."""
    ema_decay: float = 0.9998
    """Of the average of the weights, which climbs to it as 1 - step ** (-2/3); 0 keeps none."""
    clip_norm: float = 5.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    seed: int = 0
    """Of mixup and CutMix. The data have the loader's."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 2**40), ("layer_decay", 1e-6, 1), ("weight_decay", 0, 100),
            ("label_smoothing", 0, 0.999), ("mixup", 0, 100), ("cutmix", 0, 100),
            ("ema_decay", 0, 0.999999), ("warmup_fraction", 0, 0.999), ("lr", 1e-12, 100),
            ("clip_norm", 0, 1e9),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in {low:g} to {high:g}, not {value}")


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

    Zero-shot scores are s (x P) . t / |x P|. A linear head cannot divide by an image's own norm,
    which changes no ranking; it divides by the mean norm, so that probabilities begin near those of
    the model.

    Args:
        model: P is its projection, s its scale.
        classifier: unit-norm t of each class.
        features: x of some images, for the mean norm.
    """
    assert model.image_projection is not None  # it has texts to compare with
    projection = model.image_projection.to(features.dtype)
    norm = (features.to(projection.device) @ projection).norm(dim=1).mean()
    weight = classifier.to(projection.dtype) @ projection.T * (model.logit_scale.exp() / norm)
    return LinearClassifier(weight, weight.new_zeros(len(weight)))


def build_optimizer(module: FineTuned, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """AdamW over timm's groups by depth; the head is one layer above the encoder's last."""
    spared: set[str] = set()
    if hasattr(module.encoder, "no_weight_decay"):
        spared = set(cast(Any, module.encoder).no_weight_decay())
    groups = param_groups_layer_decay(
        module.encoder,
        weight_decay=settings.weight_decay,
        no_weight_decay_list=spared,
        layer_decay=settings.layer_decay,
    )
    for group in groups:
        group["lr_scale"] *= settings.layer_decay
    groups += [
        {"params": [module.head.weight], "lr_scale": 1.0, "weight_decay": settings.weight_decay},
        {"params": [module.head.bias], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


def finetune(
    model: UniCL,
    module: FineTuned,
    loader: Loader,
    *,
    labels_of: Callable[[int], Sequence[int]],
    settings: FinetuneSettings,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> FineTuned:
    """Trains encoder and head.

    Args:
        model: whose encoder `module` has; says how images are normalised and in what precision.
        module: is trained in place.
        loader: batches of labelled images, this rank's share.
        labels_of: labels of a sample, of which the first is learnt.
        settings: the recipe.
        ranks: who shares each batch. Mixup mixes within a rank's share.
        progress: show a progress bar.

    Returns:
        What is to be evaluated, in evaluation mode: the average of the weights, or `module`.

    Raises:
        ValueError: a sample without a label, or a loss that is not finite.
    """
    ranks = ranks or Ranks()
    device = next(module.parameters()).device
    precision = Precision(model.config.efficiency.precision)
    scaler = precision.build_scaler(device.type)
    num_classes = module.head.out_features
    optimizer = build_optimizer(module, settings)
    warmup = round(settings.warmup_fraction * settings.steps)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(1, settings.steps - warmup),
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    mix = None
    if settings.mixup or settings.cutmix:
        mix = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            label_smoothing=settings.label_smoothing,
            num_classes=num_classes,
        )
    average = None
    if settings.ema_decay:
        average = ModelEmaV3(module, decay=settings.ema_decay, use_warmup=True)
        undo_in_copy(average.module)
    forward = DistributedDataParallel(module) if ranks.world_size > 1 else module
    module.train()
    batches = loader.batches(0)
    bar = tqdm(total=settings.steps, desc="fine-tune", disable=not progress)
    for step in range(settings.steps):
        batch = next(batches)
        assert batch.sample_ids is not None
        labels = _first_labels(batch.sample_ids.tolist(), labels_of).to(device)
        images = prepare_images(model, batch.images)
        target: Tensor = labels
        if mix is not None:
            if len(images) % 2:
                raise ValueError(
                    f"timm's mixup takes images in pairs, and a rank's share of a batch is "
                    f"{len(images)}: make it even, or set mixup and cutmix to 0"
                )
            np.random.seed([settings.seed, step])  # mixup draws from there; the same on all ranks
            images, target = mix(images, labels)
        smoothing = settings.label_smoothing if target.ndim == 1 else 0.0
        model.set_drop_path_key(step=step, global_index=batch.global_index.to(device))
        schedule.step_update(step + 1)
        with precision.autocast(device.type):
            logits = forward(images)
        loss = F.cross_entropy(
            logits.to(torch.promote_types(torch.float32, logits.dtype)),
            target if target.ndim == 1 else target.to(logits.device, torch.float32),
            label_smoothing=smoothing,
        )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(module.parameters(), settings.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if average is not None:
            average.update(module, step=step + 1)
        if step % 10 == 0 or step + 1 == settings.steps:
            value = float(loss.detach())
            if not np.isfinite(value):
                raise ValueError(f"the loss is not finite in step {step}: take a smaller --lr")
            bar.set_postfix_str(f"loss {value:.3f}")
        bar.update()
    bar.close()
    loader.close()
    result = module if average is None else cast(FineTuned, average.module)
    if ranks.world_size > 1:  # BatchNorm's averages are those of each rank's share: take rank 0's
        for buffer in result.buffers():
            torch.distributed.broadcast(buffer, src=0)
    return result.eval()


def _first_labels(samples: Sequence[int], labels_of: Callable[[int], Sequence[int]]) -> Tensor:
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
    settings: FinetuneSettings,
) -> None:
    """Writes weights and what they are into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    description = {
        "config": config_to_dict(config),
        "class_names": list(class_names),
        "settings": dataclasses.asdict(settings),
    }
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n")


def load_finetuned(folder: str | Path) -> tuple[FineTuned, tuple[str, ...]]:
    """A fine-tuned classifier in evaluation mode on the CPU, and its class names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the files are damaged.
    """
    path = Path(folder) / DESCRIPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {DESCRIPTION_FILE}, as unicl-eval finetune makes"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        config = config_from_dict(description["config"])
        names = tuple(description["class_names"])
        model = UniCL(config).to(Precision(config.efficiency.precision).weight_type)
        module = FineTuned(model, len(names))
        module.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    return module.eval(), names
