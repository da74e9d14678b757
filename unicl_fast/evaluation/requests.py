"""What each evaluation is told: the fields are the options of `unicl-eval` and their help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unicl_fast.config import DeviceName

MetricChoice = Literal["auto", "top1", "mean_per_class"]
LayerName = Literal["encoder", "projection"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What all evaluations are told."""

    checkpoint: Path
    """A run folder (its newest checkpoint is taken), RUN/best, one checkpoint folder, or what
    unicl-convert official or hf wrote."""
    json: Path | None = None
    """Also write all numbers into this file."""
    markdown: Path | None = None
    """Also write the table into this file, as Markdown."""
    weights: Literal["auto", "ema", "model"] = "auto"
    """The moving average of the weights, those of the last step, or the average if there is one."""
    nproc: int = 1
    """Ranks to start on this machine; leave it at 1 under torchrun or SLURM. They share the
    images, each of which is counted once."""
    device: DeviceName = "auto"
    """Where the model runs."""


@dataclass(frozen=True, kw_only=True)
class EncodingEvaluation(Evaluation):
    """What evaluations are told that encode all images of a data set."""

    batch_size: int = 256
    """Images encoded at once by each rank."""


@dataclass(frozen=True, kw_only=True)
class ZeroShot(EncodingEvaluation):
    """Zero-shot classification: top-1, top-5 and mean per class, with 95 % intervals.

    Example: unicl-eval zero-shot --checkpoint runs/first --data packed/held-out class_folders/
    torchvision:OxfordIIITPet:/data
    """

    data: tuple[str, ...]
    """One data set or several, evaluated in turn: packed ones with labels (folders or URLs);
    folders or zips of class folders and whatever else unicl-pack reads; or
    torchvision:CLASS:FOLDER[:SPLIT], the files of torchvision.datasets.CLASS in FOLDER as its
    download leaves them (nothing is fetched), by default the test split."""
    class_names: tuple[str, ...] = ()
    """Names instead of the data's own: a file with one a line, imagenet, or clip-benchmark:KEY
    (pip install 'unicl_fast[evaluation]'), such as clip-benchmark:dtd. One for all data sets, or
    one for each, own standing for its own. Those of torchvision take clip-benchmark's where it is
    installed."""
    templates: tuple[str, ...] = ()
    """Prompt templates instead of the data's own: a file with one a line, imagenet, simple, or
    clip-benchmark:KEY; one for all data sets or one for each, as above."""
    metric: tuple[MetricChoice, ...] = ("auto",)
    """What counts in the table of several data sets: one for all or one for each. auto goes by the
    data set's name: as in CLIP's protocol mean_per_class for pets, flowers, aircraft and
    caltech101, top1 for others."""
    figures: Path | None = None
    """Also draw a confusion matrix of each data set into this folder."""


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures(EncodingEvaluation):
    """What evaluations on features of labelled images are told."""

    train: str
    """Labelled images to learn from; written as --data of zero-shot."""
    data: str
    """Labelled images to test on. Its classes are found among those of --train by name."""
    layer: LayerName = "encoder"
    """Features before the projection into the space of texts, as CLIP's linear probes take them, or
    behind it (unit norm), which a model trained by cross-entropy has not."""
    metric: MetricChoice = "auto"
    """What is reported first, and what C is chosen by; auto as in zero-shot."""
    features: str = "auto"
    """Folder where features are kept and found again, by a checksum of weights and images; auto
    is the folder features/ of the run, none keeps nothing."""
    figures: Path | None = None
    """Also draw a confusion matrix into this folder."""


@dataclass(frozen=True, kw_only=True)
class LinearProbe(FrozenFeatures):
    """Linear probe: logistic regression on frozen features, C chosen on a validation split.

    L-BFGS over all samples, on features extracted once. C is searched as CLIP does, from 1e-6 to
    1e6 in eighths of a decade, then training and validation images are fitted together. With
    --shots, few-shot instead: several draws, their mean and spread.
    """

    validation: str = ""
    """Labelled images to choose C by; empty sets a part of --train aside."""
    validation_fraction: float = 0.2
    """That part, of each class."""
    c: float = 0.0
    """Inverse strength of the penalty, scikit-learn's C; 0 searches it."""
    shots: tuple[int, ...] = ()
    """Few-shot: training images of each class, such as 1 2 4 8 16. C is chosen by --validation or
    by up to 4 others of each class, and the fit is on the shots alone."""
    draws: int = 3
    """Few-shot: how often images are drawn anew for each number of shots."""
    seed: int = 0
    """Of the split and the draws."""
    max_iterations: int = 1000
    """Of each fit."""
    fit_precision: Literal["fp32", "fp64"] = "fp32"
    """Arithmetic of the fits."""


@dataclass(frozen=True, kw_only=True)
class Knn(FrozenFeatures):
    """Classification by the k nearest training images, weighted as DINO does; exact."""

    k: tuple[int, ...] = (10, 20)
    """Numbers of neighbours, each reported; those beyond the training images are refused."""
    temperature: float = 0.07
    """A neighbour's weight is exp(cosine / temperature)."""


@dataclass(frozen=True, kw_only=True)
class Finetune(EncodingEvaluation):
    """Fine-tuning: the image encoder and a linear head trained on labels by timm's recipe.

    AdamW with a rate that decays with depth, warm-up and cosine, label smoothing, mixup, an average
    of the weights. The last average is tested, once: nothing is chosen by the test images. Crops
    and flips are those of the checkpoint's config.
    """

    train: str
    """Labelled images to train on, all of them; written as --data of zero-shot."""
    data: str
    """Labelled images to test on."""
    out: Path
    """Folder for the fine-tuned weights."""
    head: Literal["probe", "zero-shot", "fresh"] = "probe"
    """What the head begins as: a linear probe, the zero-shot classifier, or zeros."""
    epochs: float = 10.0
    """Passes over the training images."""
    train_batch_size: int = 128
    """Images of one step over all ranks."""
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
    """Alpha of mixup; 0 does none. Mixes within a rank's share of the batch."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 does none."""
    ema_decay: float = 0.9998
    """Of the average of the weights, climbing to it as 1 - step ** (-2/3); 0 keeps none."""
    clip_norm: float = 5.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    augment: str | None = None
    """What else is done to training images instead of the checkpoint's data.augment, such as
    unicl; see docs/augmentation.md."""
    seed: int = 0
    """Of the order, the crops and mixup."""
    metric: MetricChoice = "auto"
    """What is reported first; auto as in zero-shot."""
    figures: Path | None = None
    """Also draw a confusion matrix into this folder."""


@dataclass(frozen=True, kw_only=True)
class Detect(Evaluation):
    """Transfer to detection: a detector trained over the image encoder, and COCO's metrics.

    torchvision's Faster R-CNN or Mask R-CNN over a feature pyramid of the encoder's maps, BatchNorm
    frozen, by the 1x schedule. Annotations are of COCO's form (pip install
    'unicl_fast[evaluation]').
    """

    train: Path
    """Objects to train on, an instances_*.json."""
    train_images: Path
    """Folder of their images."""
    data: Path
    """Objects to test on, an instances_*.json."""
    images: Path
    """Folder of their images."""
    out: Path
    """Folder for the detector, its detections and its description."""
    masks: bool = False
    """Mask R-CNN and the metrics of masks too; else Faster R-CNN."""
    epochs: float = 12.0
    """Passes over the training images; 12 is the 1x schedule. The rate drops to a tenth after
    8/12 and 11/12 of them."""
    train_batch_size: int = 16
    """Images of one step over all ranks."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw (weight decay 0.05) as usual for Swin, or sgd (momentum 0.9, weight decay 1e-4) as
    usual for ResNet."""
    lr: float = 1e-4
    """Peak learning rate; usual for a batch of 16: 1e-4 with adamw, 0.02 with sgd."""
    warmup_steps: int = 500
    """Steps during which the rate climbs from a thousandth; at most a quarter of all."""
    min_size: int = 800
    """The shorter side of an image is scaled to this, in pixels,"""
    max_size: int = 1333
    """unless the longer one would be longer than this."""
    boxes_per_image: int = 512
    """Proposals of an image that the heads are trained on."""
    workers: int = 2
    """Processes of each rank that decode images; 0 decodes in the rank itself."""
    seed: int = 0
    """Of the heads, the order, the flips and the proposals."""


@dataclass(frozen=True, kw_only=True)
class Retrieval(EncodingEvaluation):
    """Caption retrieval in both directions: recall at 1, 5 and 10, with intervals and chance.

    All captions of an image count: it finds one if any of them is among the first k.
    """

    data: str
    """Images with captions: a packed data set (a folder or a URL), or what else unicl-pack reads,
    such as a list."""
    figures: Path | None = None
    """Also draw images over the captions they find, and captions over the images they find,
    into this folder."""
