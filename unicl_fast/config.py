"""Every setting of a run, in seven frozen groups, checked when they are made.

The sentence under a field is its documentation and its `--help` text. A `TrainConfig` goes to and
from JSON without loss and is stored in every checkpoint; evaluation starts from it. What stands
in `EfficiencyConfig` may change speed and memory, never results (precision within its rounding).
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unicl_fast.augmentation import check_augment_entries, require

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Far beyond what anybody trains: damaged settings should not take memory before they are noticed.
_MOST_PIXELS_A_SIDE = 8192
_MOST_CLASSES = 2**24
_MOST = {
    "text_width": 65_536, "text_layers": 1024, "text_heads": 1024, "context_length": 65_536,
    "vocab_size": 2**24, "embed_dim": 65_536,
}  # fmt: skip

Interpolation = Literal["bilinear", "bicubic"]
Resample = Literal["fused", "dali"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "fp64"]
LossForm = Literal["auto", "dense", "tiled"]
DeviceName = Literal["auto", "cpu", "cuda"]
ObjectiveName = Literal["unicl", "clip", "supcon", "ce"]
OptimizerName = Literal["adamw", "lamb", "fusedadamw", "fusedlamb", "auto"]


def _require_known_choices(group: str, settings: object) -> None:
    """Refuses values that are not among those of a field's Literal type."""
    for name, kind in typing.get_type_hints(type(settings)).items():
        choices, value = typing.get_args(kind), getattr(settings, name)
        if typing.get_origin(kind) is Literal and value not in choices:
            raise ValueError(f"{group}.{name} must be one of {', '.join(choices)}, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which packed data sets, which text for a sample, and how an image is cut out."""

    train: tuple[str, ...] = ()
    """Packed data sets to train on, each DIR or DIR=SHARE, SHARE being its part of every batch;
    without shares a data set's part is its part of all samples."""
    fraction: tuple[float, ...] = (1.0,)
    """Part of each data set that is used, one number for all or one for each: 0.5 is its first
    half, which is a random one, since packing has shuffled it."""
    evaluate: tuple[str, ...] = ()
    """Packed data sets with labels whose zero-shot accuracy is taken during training."""
    text: Literal["any", "captions", "labels"] = "any"
    """The text of a sample that has both captions and labels: one of its captions, the prompt of
    one of its labels, or (any) one of the two with equal chance, drawn anew at each visit."""
    templates: Literal["per_sample", "per_class"] = "per_sample"
    """Draw the prompt template for each sample, as in the paper, or once for each class and batch:
    then a batch has no more prompts to encode than it has classes."""
    label_space: Literal["separate", "shared"] = "separate"
    """Whether label 3 of two data sets is two classes (which still meet if their names are equal)
    or the same one (then their lists of class names must be equal)."""
    image_size: int = 224
    """Side of the square image the model sees, in pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest part of the image's area that a training crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width/height of a training crop."""
    flip_probability: float = 0.5
    """Chance of a horizontal flip in training."""
    augment: tuple[str, ...] = ()
    """What else is done to training images: a preset (none, clip, unicl, supcon) and changes to
    it, for example unicl,blur=0.5; NAME:SPEC is for the data set whose folder is called NAME. See
    docs/augmentation.md."""
    evaluation_resize: int = 256
    """Evaluation scales the shorter side to this, in pixels, then cuts image_size in the centre."""
    interpolation: Interpolation = "bilinear"
    """Filter for resizing; both are antialiased."""
    resample: Resample = "fused"
    """What resizes and augments on the CPU: fused operators, or DALI's own. On a GPU it is
    DALI's."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of each colour channel, of values in 0 to 1."""
    std: tuple[float, float, float] = CLIP_STD
    """Standard deviation of each colour channel, of values in 0 to 1."""
    threads: int = 0
    """Decoding threads of each rank; 0 takes the cores this job may use, divided by its ranks
    on this machine."""
    prefetch: int = 0
    """Batches decoded ahead of the step, in each of the decoder's graphs (two, which take turns, on
    the CPU, one on a GPU). 0: four of small batches, up to 5 MB of images a rank, two of large
    ones, where more cost memory and gain nothing."""
    hw_decoder_load: float = 0.65
    """On a GPU, the part of each batch's JPEGs that its hardware decoder takes, where it has one;
    the others are decoded by its cores. Worth trying: DALI's own benchmark on a Hopper takes 0.12
    with 70 threads."""
    decoder_hint: tuple[int, int] = (0, 0)
    """On a GPU, height and width in pixels of images that the decoder sets memory aside for at
    the start, instead of when larger ones come."""
    shuffle_window: int = 0
    """Samples that are shuffled among each other; 0: all of a data set. With a number, a pass goes
    through a data set in windows of so many samples, each put together of 16 stretches from all
    over it, others in each pass. For data sets under a URL that are larger than cache_bytes: a
    window is then fetched while the one before it is trained on, and each byte once a pass."""
    cache_folder: str = ""
    """Where data sets under a URL (s3://bucket/folder) are kept while they are read, for all ranks
    of a machine; empty takes unicl_fast in ~/.cache."""
    cache_bytes: int = 20_000_000_000
    """Most that images take there; what was used longest ago makes room. Arrays come on top."""
    block_bytes: int = 4_194_304
    """Of one request to a URL's store, and of one file of the cache."""
    read_ahead: int = 65_536
    """Samples of a global batch's order whose images are fetched from a URL before their turn, as
    far as half of cache_bytes holds them; 0 fetches what is missing when it is needed."""
    max_bad_fraction: float = 0.01
    """Samples that cannot be read or decoded are replaced by others and listed in quarantine.csv
    of the run; a run stops when they are more than this part of what it has fed (of at least
    10,000), and does not start when more than this part of a data set is missing."""

    def __post_init__(self) -> None:
        _require_known_choices("data", self)
        require(
            len(self.fraction) in {1, len(self.train)}
            and all(0 < part <= 1 for part in self.fraction),
            "data.fraction takes one number in (0, 1] for all data sets or one for each of the "
            f"{len(self.train)}, not {self.fraction}",
        )
        require(
            1 <= self.image_size <= _MOST_PIXELS_A_SIDE,
            f"data.image_size must lie in 1 to {_MOST_PIXELS_A_SIDE}, not {self.image_size}",
        )
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            f"data.crop_scale must rise within (0, 1], not {self.crop_scale}",
        )
        low, high = self.crop_ratio
        require(0 < low <= high, f"data.crop_ratio must rise above 0, not {self.crop_ratio}")
        require(
            0 <= self.flip_probability <= 1,
            f"data.flip_probability must lie in 0 to 1, not {self.flip_probability}",
        )
        check_augment_entries(self.augment)
        require(
            self.evaluation_resize >= self.image_size,
            f"data.evaluation_resize ({self.evaluation_resize}) must not be smaller than "
            f"data.image_size ({self.image_size})",
        )
        require(min(self.std) > 0, f"data.std must be positive, not {self.std}")
        require(self.threads >= 0, f"data.threads must not be negative, not {self.threads}")
        require(self.prefetch >= 0, f"data.prefetch must not be negative, not {self.prefetch}")
        require(
            0 <= self.hw_decoder_load <= 1,
            f"data.hw_decoder_load must lie in 0 to 1, not {self.hw_decoder_load}",
        )
        require(
            min(self.decoder_hint) >= 0,
            f"data.decoder_hint must not be negative, not {self.decoder_hint}",
        )
        require(
            self.shuffle_window >= 0 and self.read_ahead >= 0,
            "data.shuffle_window and data.read_ahead must not be negative, not "
            f"{self.shuffle_window} and {self.read_ahead}",
        )
        require(
            4096 <= self.block_bytes <= self.cache_bytes // 16,
            "data.block_bytes must lie between 4096 and a sixteenth of data.cache_bytes, not "
            f"{self.block_bytes} of {self.cache_bytes}",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction must lie in 0 to 1, not {self.max_bad_fraction}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The two encoders and the space they meet in."""

    image_encoder: str = "swin_tiny_patch4_window7_224"
    """Name of a timm model, or of one registered by unicl_fast.models.small."""
    drop_path: float = 0.0
    """Stochastic depth of the image encoder: chance that its last residual branch is left out."""
    text_width: int = 512
    """Width of the text encoder."""
    text_layers: int = 12
    """Blocks of the text encoder."""
    text_heads: int = 8
    """Attention heads of each block; divides text_width."""
    context_length: int = 77
    """Longest text in tokens, start and end tokens included."""
    vocab_size: int = 49408
    """Size of the tokenizer's vocabulary."""
    embed_dim: int = 512
    """Dimension of the space in which images and texts are compared."""
    logit_scale_init: float = math.log(1 / 0.07)
    """Start value of the learnt logarithm of the scale; the paper's code starts at 1.0."""
    logit_scale_max: float = math.log(100)
    """The logarithm of the scale is kept at or below this; inf leaves it free as the paper does."""
    learn_logit_scale: bool = True
    """False keeps the scale at its start value, as SupCon does (1 / 0.1)."""

    def __post_init__(self) -> None:
        require(0 <= self.drop_path < 1, f"model.drop_path must lie in [0, 1): {self.drop_path}")
        for name, most in _MOST.items():
            value = getattr(self, name)
            require(1 <= value <= most, f"model.{name} must lie in 1 to {most}, not {value}")
        require(
            self.text_width % self.text_heads == 0,
            f"model.text_heads ({self.text_heads}) must divide model.text_width "
            f"({self.text_width})",
        )
        require(
            math.isfinite(self.logit_scale_init),
            f"model.logit_scale_init must be finite, not {self.logit_scale_init}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is learnt of the images; docs/objectives.md."""

    name: ObjectiveName = "unicl"
    """unicl: images against texts, those of the same class are positives. clip: the same, but
    only equal texts are of the same class, labels are not looked at. supcon: two views of each
    image against all others, by label, without texts (data.augment must show two views). ce:
    cross-entropy over one learnt row for each class, without texts."""
    mixup: float = 0.0
    """Images with labels are mixed two by two, in parts drawn from Beta(mixup, mixup); 0 mixes
    none. For unicl and ce."""
    cutmix: float = 0.0
    """The same with rectangles cut out of one and put into the other (CutMix)."""
    mix_probability: float = 1.0
    """Part of the pairs that are mixed, where mixup or cutmix is set."""
    cutmix_share: float = 0.5
    """Where both are set: the part of the mixed pairs that CutMix gets."""
    num_classes: tuple[int, ...] = ()
    """For ce: learnt rows for each data set, or one number where data.label_space is shared. Empty
    takes the data's."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        _require_known_choices("objective", self)
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"objective.{name} must not be negative, not {value}")
        for name in ("mix_probability", "cutmix_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"objective.{name} must lie in 0 to 1, not {value}")
        require(
            not self.mixes or self.name in ("unicl", "ce"),
            f"objective.mixup and objective.cutmix mix labels, which {self.name} does not have: "
            "take unicl or ce, or set both to 0",
        )
        require(
            all(0 <= count <= _MOST_CLASSES for count in self.num_classes),
            f"objective.num_classes must lie in 0 to {_MOST_CLASSES}, not {self.num_classes}",
        )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def has_texts(self) -> bool:
        """Whether images are compared with texts, so that there is a text encoder."""
        return self.name in ("unicl", "clip")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The released recipe's groups, warm-up and cosine, with the optimizer one likes."""

    name: OptimizerName = "adamw"
    """AdamW (torch's), LAMB (timm's, for very large batches), the fused kernels of NVIDIA's apex
    for either, or auto, the one of them that needs no wait: torch's AdamW. All but its fused kernel
    make the host wait for the device once a step, to know if a bad one is left out."""
    lr: float = 5e-4
    """Peak learning rate for a global batch of lr_batch_size; scaled linearly to the real one."""
    lr_batch_size: int = 512
    """The global batch size that lr is meant for; 0 takes lr as it is."""
    lr_min: float = 5e-6
    """Learning rate at the end of the cosine, scaled in the same way."""
    warmup_fraction: float = 5 / 32
    """Part of the run during which the learning rate climbs from 0 in a straight line."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.1
    """Decoupled weight decay; none on 1-D parameters, biases, logit_scale and position tables."""
    clip_norm: float = 5.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is evaluated and stored beside them, for
    example 0.9999; 0 keeps none."""
    ema_warmup: bool = True
    """Let the decay climb to ema_decay as 1 - step ** (-2/3), so that the first, random weights are
    soon forgotten; False takes ema_decay from the second step on."""

    def __post_init__(self) -> None:
        _require_known_choices("optim", self)
        require(
            0 <= self.ema_decay < 1, f"optim.ema_decay must lie in [0, 1), not {self.ema_decay}"
        )
        require(self.lr > 0, f"optim.lr must be positive, not {self.lr}")
        require(self.lr_batch_size >= 0, "optim.lr_batch_size must not be negative")
        require(0 <= self.lr_min <= self.lr, "optim.lr_min must lie between 0 and optim.lr")
        require(
            0 <= self.warmup_fraction < 1,
            f"optim.warmup_fraction must lie in [0, 1), not {self.warmup_fraction}",
        )
        require(self.clip_norm >= 0, f"optim.clip_norm must not be negative: {self.clip_norm}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficiencyConfig:
    """Speed and memory. Nothing here changes what is learnt, precision's rounding aside."""

    precision: PrecisionName = "fp32"
    """Arithmetic of the encoders: autocast to bf16 or fp16 (with loss scaling), or plain. The loss
    is always taken in fp32 or better. auto takes bf16 where the machine computes it faster than
    fp32 (fp16 on GPUs without it), else fp32; a resumed run keeps what it began with."""
    channels_last: bool = True
    """Keep images and convolution weights in NHWC order, as they leave the decoder."""
    activation_checkpointing: bool = False
    """Recompute each encoder block in backward instead of storing its activations: about 1.3 times
    the time for a third to half of the memory."""
    compile: bool = False
    """Compile both encoders with torch.compile: minutes at the start, faster steps after. Texts are
    padded to a few sizes, so that new ones seldom compile anew. Needs a C++ compiler. Refused
    with activation_checkpointing of BatchNorm."""
    micro_batch_size: int = 0
    """Images that a rank encodes at once; 0: its whole share of the batch. Each is encoded twice,
    for about 4/3 of the time, and activations are kept for this many only. The loss is still that
    of the whole global batch. Refused with BatchNorm."""
    unique_texts: bool = True
    """Encode equal texts of a batch once."""
    text_layout: Literal["padded", "trimmed", "packed"] = "packed"
    """Compute texts with their padding to the context length, with padding to the longest of the
    batch, or without padding: all tokens in one row, for attention spread out where there is no
    kernel for rows of any length. Packing needs unique_texts; without it texts are trimmed."""
    loss: LossForm = "auto"
    """Hold the logits of all images and texts (dense), or go through them in tiles and store none
    (tiled): the same loss in a fiftieth of the memory. auto takes tiles where they are faster."""
    fused_optimizer: bool = True
    """For optim.name=adamw: torch's fused kernel instead of its loop over parameters. Also the one
    that leaves out the update of a bad step without the host waiting for the device."""

    def __post_init__(self) -> None:
        _require_known_choices("efficiency", self)
        require(
            self.micro_batch_size >= 0,
            f"efficiency.micro_batch_size must not be negative, not {self.micro_batch_size}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_steps: int = 1000
    """Steps between checkpoints; the last step always writes one. 0 writes only the last."""
    keep: int = 3
    """How many of the newest checkpoints stay on disk; 0 keeps all."""
    best: str = ""
    """The number of an evaluation whose highest value keeps its checkpoint too, for example
    zero_shot/NAME/top1; empty takes top1 of the first data set in data.evaluate; none: no best."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "checkpoint.every_steps must not be negative")
        require(self.keep >= 0, "checkpoint.keep must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How long, how large, where, and what is written down."""

    seed: int = 0
    """Decides first weights, order of samples, crops, flips, prompts and drop path."""
    global_batch_size: int = 512
    """Samples in one optimizer step over all ranks; the number of ranks must divide it."""
    samples: int = 0
    """Length of the run in samples seen, rounded up to whole steps. 0, and no steps either:
    unicl-pretrain takes 32 passes over the data, as the released recipe does."""
    steps: int = 0
    """Length of the run in optimizer steps; counts instead of samples where it is not 0."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every_steps: int = 0
    """Steps between evaluations of data.evaluate; the last step always has one. 0: only then."""
    device: DeviceName = "auto"
    """Where the model trains and images are decoded; auto takes CUDA when there is any."""
    max_bad_steps: int = 0
    """Steps of this process whose loss or gradient norm may be not finite: each update is left out,
    and said loudly. One more stops the run. Their samples are in non-finite-step-*.json."""
    timeout_seconds: float = 600
    """A rank that waits for a batch, for other ranks or for storage longer than this has hung: it
    says in what, and ends the run with code 70. Before the first step is done it has 3 times as
    long; with efficiency.compile 6 times, for 16 steps and in evaluations. 0: no limit."""

    def __post_init__(self) -> None:
        _require_known_choices("run", self)
        require(
            self.global_batch_size >= 1,
            f"run.global_batch_size must be positive, not {self.global_batch_size}",
        )
        require(
            self.samples >= 0 and self.steps >= 0,
            f"run.samples and run.steps must not be negative, not {self.samples}, {self.steps}",
        )
        require(self.log_every_steps >= 1, "run.log_every_steps must be at least 1")
        require(self.evaluate_every_steps >= 0, "run.evaluate_every_steps must not be negative")
        require(self.max_bad_steps >= 0, "run.max_bad_steps must not be negative")
        require(
            0 <= self.timeout_seconds < math.inf,
            f"run.timeout_seconds must be 0 (no limit) or more, not {self.timeout_seconds}",
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; 0 if no length is given."""
        return self.steps or -(-self.samples // self.global_batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole training run."""

    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested dictionaries, as stored in config.json."""
    return dataclasses.asdict(config)


def config_from_dict(values: dict[str, Any]) -> TrainConfig:
    """Rebuilds a config from `config_to_dict`'s result or its JSON.

    Raises:
        ValueError: a group or field that this version does not know, or a value out of range.
    """
    return typing.cast(TrainConfig, _build(TrainConfig, values, path=""))


def load_config(path: Path) -> TrainConfig:
    """Reads a config.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not a config of this version.
    """
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return config_from_dict(values)


def _build(cls: type[Any], values: Any, *, path: str) -> Any:
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"config: {path or 'the whole'} must be an object, not a {kind}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(
            f"config: {path + '.' if path else ''}{unknown[0]} is not a setting of this version; "
            f"known are {', '.join(hints)}"
        )
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            arguments[name] = _build(typing.cast(Any, hint), value, path=name)
        else:
            arguments[name] = _typed(value, hint, name=f"{path}.{name}")
    return cls(**arguments)


def _typed(value: Any, hint: Any, *, name: str) -> Any:
    """A setting out of JSON, which has no tuples; refuses values of another type."""
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list):
            if kinds[-1] is Ellipsis:
                kinds = kinds[:1] * len(value)
            if len(kinds) == len(value):
                pairs = zip(value, kinds, strict=True)
                return tuple(_typed(entry, kind, name=name) for entry, kind in pairs)
    elif _is_of(value, hint):
        return value
    raise ValueError(
        f"config: {name} must be of type {getattr(hint, '__name__', hint)}, not {_short(value)}"
    )


def _is_of(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str)  # which ones are known is checked with the other settings
    if isinstance(value, bool) or hint is bool:  # a bool is an int to Python
        return isinstance(value, bool) and hint is bool
    if isinstance(value, int):
        return hint in (int, float) and abs(value) < 2**63
    return isinstance(value, hint) and value == value  # NaN is of no use anywhere


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: a number of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else text[:100] + "..."
