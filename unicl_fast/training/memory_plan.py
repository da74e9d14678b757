"""The memory of a training step, part by part, planned before anything is built.

The encoders run once on fake tensors, which have shapes and no content, and the tensors saved for
backward are counted. That needs seconds and no memory, so a config can be planned for a GPU that is
not there. The other parts follow from the settings.

A run is checked against free memory before its first step, since a process that runs out of memory
on the host is killed without a message, often late in the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import DataConfig, EfficiencyConfig, OptimConfig, Shard, TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.blocks import find_blocks, has_batch_norm
from unicl_fast.models.compilation import fuse_window_attention
from unicl_fast.models.freezing import freeze
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.precision import Precision, place_module
from unicl_fast.models.sharding import check_sharding, largest_load
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.loss import stores_logits
from unicl_fast.objectives.loss_tiled import LARGEST_TILE
from unicl_fast.system.machine import free_memory

logger = logging.getLogger(__name__)

_EncodeOne = Callable[[UniCL, Tensor], Tensor]

FIXED_BYTES = {"cuda": 3_000_000_000, "cpu": 0}
"""Memory of a GPU outside torch's allocator. An unmeasured estimate: about 0.5 GB of CUDA context
and kernels, 1 GB of NCCL's buffers, 1.5 GB of DALI's decoder. On a host it is in use already."""
SLACK = 0.1  # part of the sum that is added for temporaries of single layers and fragmentation
_DENSE_COPIES = 7.25
"""Matrices as large as the logits at the dense loss's peak, in backward: 7.3 by the peak memory of
a process (torch 2.13, CPU). Products, logits with and without counts, weighted logits twice and two
gradients make 7; byte masks are the rest."""
_BATCHES_IN_FLIGHT = 4  # decoded batches of a rank besides the step's own, in both decoding graphs


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that one rank needs at the peak of a step."""

    parts: dict[str, int]
    """By name; "texts: ..." are upper bounds, since texts have all lengths."""
    device_bytes: int  # memory available to the rank
    images_at_once: int
    image_bytes: int  # bytes that the image encoder keeps of one image for backward

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def certain(self) -> int:
        """The sum without slack and without the texts, which vary."""
        uncertain = ("slack", "texts: activations")
        return sum(size for name, size in self.parts.items() if name not in uncertain)

    @property
    def fits(self) -> bool:
        return self.total <= self.device_bytes

    def __str__(self) -> str:
        largest_first = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest_first if size > 5e7)


def plan(
    config: TrainConfig,
    *,
    world_size: int,
    device_bytes: int,
    device_type: str = "cuda",
    longest_text: int | None = None,
) -> MemoryPlan:
    """Plans the memory of one of `world_size` ranks.

    Encoders are planned uncompiled, and windows with `auto` attention as timm's; real runs can keep
    less. `longest_text` is in tokens; None means the context length. Every text of a batch is
    assumed to be that long and distinct.

    Raises ValueError: ranks that cannot share the global batch evenly, or an unknown encoder.
    """
    config = _with_known_precision(config, device_type)
    efficiency, objective = config.efficiency, config.objective
    batch = Ranks(world_size=world_size).local_batch_size(config.run.global_batch_size)
    at_once = min(batch, efficiency.micro_batch_size or batch)
    length = min(longest_text or config.model.context_length, config.model.context_length)
    encoders = _measure(_only_encoders(config), device_type, length)
    width, gathered = encoders.feature_width, 0
    number_bytes = Precision(efficiency.precision).weight_type.itemsize
    if world_size > 1 and objective.has_space:
        gathered = config.run.global_batch_size * width * number_bytes
    pixels = 3 * config.data.image_size**2
    tokens = 8 * config.model.context_length * objective.uses_texts
    # several ranks also hold the next batch: `text_columns.asked_ahead`
    batches = 1 + _BATCHES_IN_FLIGHT + (world_size > 1)
    parts = {
        "images: activations": at_once * encoders.image_bytes,
        "texts: activations": at_once * encoders.text_bytes,
        **_bytes_of_state(config, encoders, world_size, device_type),
        # the features of all ranks, and their gradient on its way back
        "gathered features": 2 * gathered,
        "loss": _loss_bytes(config, batch, width, device_type),
        "batches in flight": batches * batch * (pixels + tokens),
        "fixed": FIXED_BYTES[device_type],
    }
    parts["slack"] = int(SLACK * sum(parts.values()))
    return MemoryPlan(parts, device_bytes, at_once, encoders.image_bytes)


def _bytes_of_state(
    config: TrainConfig, encoders: _Encoders, world_size: int, device_type: str
) -> dict[str, int]:
    """Weights, gradients, the optimizer's state and their copies, by part."""
    number_bytes = Precision(config.efficiency.precision).weight_type.itemsize
    shard = config.efficiency.shard if world_size > 1 else "off"
    weights = number_bytes * encoders.num_parameters
    trained = number_bytes * sum(encoders.trainable_sizes)
    divided, gradients = weights, trained
    if shard == "full":
        divided, gradients = (number_bytes * n for n in encoders.parts_of_rank(world_size))
    updated = gradients
    if shard == "optimizer":
        updated = number_bytes * largest_load(encoders.trainable_sizes, world_size)
    parts = {
        "parameters": divided + encoders.buffer_bytes,
        "parameters in the narrow type": encoders.narrow_bytes,
        # DDP's buckets are the same memory (gradient_as_bucket_view)
        "gradients": gradients,
        # two averages of each parameter; the update's temporaries come after the activations
        "optimizer": 2 * updated,
        "checkpoint": 0,
    }
    if device_type == "cpu":
        # checkpoints are written from a copy on the host; rank 0 joins divided tensors before it
        copied = weights + 2 * trained
        joined = {"off": 0, "optimizer": 2 * (trained - updated), "full": copied}
        parts["checkpoint"] = copied + joined[shard]
    if shard == "full":
        # whole for a while: two blocks, one ahead of its use, a block's gradient, the copy of it
        # that is sent, and all parameters outside of blocks
        collected = 4 * encoders.largest_block + encoders.outside_blocks
        parts["collected parameters"] = number_bytes * collected
    return parts


def check_memory(
    config: TrainConfig,
    *,
    ranks: Ranks,
    device: torch.device,
    longest_text: int | None = None,
    free_bytes: int | None = None,
    stage: int | None = None,
) -> None:
    """Logs the memory of a step, warns if it will hardly fit, and refuses it if it cannot.

    Called before the model is built, with its kernels settled. `free_bytes` is the least of all
    ranks; None reads this rank's. `stage` is the config's index in `run.stages`.

    Raises ValueError: more is needed than is free, for any texts; says what would fit.
    """
    arguments: dict[str, Any] = {
        "device_bytes": free_memory(device) if free_bytes is None else free_bytes,
        "device_type": device.type,
        "longest_text": longest_text,
    }
    config = _with_known_precision(config, device.type)
    found = plan(config, world_size=ranks.world_size, **arguments)
    where = "" if stage is None else f"stage {stage + 1} of run.stages: "
    needs = f"{found.total / 1e9:.1f} GB, and {found.device_bytes / 1e9:.1f} GB are free"
    if found.fits:
        logger.info("memory: %sa step needs up to %s", where, needs)
        return
    advice = _advice(config, world_size=ranks.world_size, **arguments)
    # fused kernels of compiled blocks keep a part of what is saved for backward: maybe half
    compiled = config.efficiency.compile == "blocks"
    least = found.certain - compiled * found.parts["images: activations"] // 2
    if least > found.device_bytes:
        raise ValueError(
            f"{where}a step needs at least {least / 1e9:.1f} GB, and "
            f"{found.device_bytes / 1e9:.1f} are free (in GB: {found}); {advice}"
        )
    logger.warning(
        "%sa step may need %s. In GB: %s (%d images of %.1f MB at once). %s", where, needs, found,
        found.images_at_once, found.image_bytes / 1e6, advice,
    )  # fmt: skip


def _advice(config: TrainConfig, *, world_size: int, **arguments: Any) -> str:
    """Names the settings that fit, each with what it needs."""
    batch = config.run.global_batch_size // world_size
    micro = min(batch, config.efficiency.micro_batch_size or batch)
    smaller = [1 << power for power in reversed(range((micro - 1).bit_length()))]
    model = build_on_meta(config, arguments["device_type"])
    objective = config.objective
    can_split = objective.uses_texts and not has_batch_norm(model)
    recomputing = _with(config, activation_checkpointing=True)
    shards: tuple[Shard, ...] = ("optimizer", "full") if world_size > 1 else ()
    doubled = [world_size << power for power in range(1, batch.bit_length())]
    kinds: list[list[tuple[str, TrainConfig, int]]] = [
        [(f"efficiency.micro_batch_size={size} (the same result)",
          _with(config, micro_batch_size=size), world_size) for size in smaller if can_split],
        [("efficiency.activation_checkpointing=True (the same result)", recomputing, world_size)],
        [(f"efficiency.shard={shard}", _with(config, shard=shard), world_size) for shard in shards
         if _can_shard(model, config, shard)],
        [(f"{n} ranks", config, n) for n in doubled if not config.run.global_batch_size % n],
    ]  # fmt: skip
    fitting = []
    for kind in kinds:
        for name, changed, ranks in kind:
            found = plan(changed, world_size=ranks, **arguments)
            if found.fits:
                fitting.append(f"{name}: {found.total / 1e9:.1f} GB")
                break
    if not fitting:
        return "No such change is enough: choose a smaller image encoder or data.image_size"
    return f"What fits: {'; '.join(fitting)}"


def _can_shard(model: UniCL, config: TrainConfig, shard: Shard) -> bool:
    try:
        check_sharding(_with(config, shard=shard).efficiency, optimizer=config.optim.name)
    except ValueError:
        return False
    has_blocks = all(map(find_blocks, model.encoders))
    return config.efficiency.shard == "off" and (shard == "optimizer" or has_blocks)


def _loss_bytes(config: TrainConfig, num_images: int, width: int, device_type: str) -> int:
    """Logits (or tiles) of a rank's images; copies and gradients of features."""
    num_columns = config.objective.num_columns(config.run.global_batch_size)
    number_bytes = Precision(config.efficiency.precision).weight_type.itemsize
    features = 4 * (num_images + num_columns) * width * number_bytes
    num_logits = num_images * num_columns
    form = config.efficiency.loss if "tiled" in config.objective.forms else "dense"
    if stores_logits(form, num_logits, device_type):
        return features + int(_DENSE_COPIES * num_logits * number_bytes)
    return features + 2 * min(num_logits, LARGEST_TILE[device_type]) * number_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class _Encoders:
    """The sizes of both encoders, of one image and of one text."""

    num_parameters: int
    buffer_bytes: int
    narrow_bytes: int
    image_bytes: int
    text_bytes: int
    feature_width: int
    trainable_sizes: tuple[int, ...]  # of each parameter that is updated
    divided_shapes: tuple[tuple[torch.Size, bool], ...]
    """Shapes of encoder parameters, which `shard=full` divides by rows, and if they train."""
    largest_block: int  # its number of parameters
    outside_blocks: int  # number of the encoders' parameters in no block

    def parts_of_rank(self, world_size: int) -> tuple[int, int]:
        """Parameters that a rank of divided encoders holds, and those it updates."""

        def part(of_all: int, shapes: list[torch.Size]) -> int:
            whole = of_all - sum(shape.numel() for shape in shapes)  # of no encoder
            return whole + sum(-(-shape[0] // world_size) * shape[1:].numel() for shape in shapes)

        every = [shape for shape, _ in self.divided_shapes]
        updated = [shape for shape, is_updated in self.divided_shapes if is_updated]
        return part(self.num_parameters, every), part(sum(self.trainable_sizes), updated)


def _only_encoders(config: TrainConfig) -> TrainConfig:
    """The config with defaults for all that leaves the encoders alone, to share `_measure`."""
    size, efficiency = config.data.image_size, config.efficiency
    return TrainConfig(
        data=DataConfig(
            image_size=size,
            evaluation_resize=size,
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            flip_probability=0.0,
        ),
        model=config.model,
        objective=config.objective,
        optim=OptimConfig(freeze=config.optim.freeze, lora=config.optim.lora),
        efficiency=EfficiencyConfig(
            precision=efficiency.precision,
            activation_checkpointing=efficiency.activation_checkpointing,
            stored_features="yes" if efficiency.stored_features else "",
            window_attention="triton" if efficiency.window_attention == "triton" else "timm",
        ),
    )


def check_sizes(config: TrainConfig, device_type: str) -> None:
    """Refuses (ValueError) image sizes, of any stage, that the encoder does not support."""
    build_on_meta(_with(config, window_attention="timm"), device_type)  # the other imports triton


def build_on_meta(config: TrainConfig, device_type: str) -> UniCL:
    """The model without content, as `place_module` sets it up and `freeze` leaves it.

    Attention for rows of varying length is not planned: with texts of one length it saves nothing.
    """
    precision, meta = Precision(config.efficiency.precision), torch.device("meta")
    with meta:
        model = build_model(config)
    freeze(model)
    if config.efficiency.window_attention == "triton":
        fuse_window_attention(model.image_encoder)
    if device_type == "cpu":
        place_module(model, device=meta, precision=precision)
    return model.to(dtype=precision.weight_type)


def _with(config: TrainConfig, **efficiency: Any) -> TrainConfig:
    return config.changed(efficiency=efficiency)


def _with_known_precision(config: TrainConfig, device_type: str) -> TrainConfig:
    """Replaces `auto` by the precision that keeps the most on such a device."""
    if config.efficiency.precision != "auto":
        return config
    return _with(config, precision="bf16" if device_type == "cuda" else "fp32")


@functools.lru_cache(maxsize=32)
def _measure(config: TrainConfig, device_type: str, text_length: int) -> _Encoders:
    """Runs both encoders on fake tensors.

    Batches of two sizes are compared: narrow copies of parameters are kept once, for all images.
    """
    precision = Precision(config.efficiency.precision)
    model = plain = build_on_meta(config, device_type)
    if config.efficiency.activation_checkpointing or config.optim.freeze:
        all_kept = _with(config, activation_checkpointing=False, stored_features="")
        plain = build_on_meta(dataclasses.replace(all_kept, optim=OptimConfig()), device_type)
    size = config.data.image_size
    with FakeTensorMode(allow_non_fake_inputs=True):  # some encoders hold tables of their own
        for one in {model, plain}:
            one.to_empty(device="cpu").eval()

        def images(count: int) -> Tensor:
            if config.efficiency.stored_features:  # a step does not run the encoder
                return torch.empty(count, feature_width(model.image_encoder))
            pixels = torch.empty(count, 3, size, size, dtype=precision.compute_type)
            return pixels.to(memory_format=torch.channels_last)

        def texts(count: int) -> Tensor:
            return torch.empty(count, text_length, dtype=torch.int64)

        def kept(tower: str, encode: _EncodeOne, make: Any) -> tuple[int, int, int]:
            """Bytes of one sample, of all samples together, and the width of a feature."""

            def measured(one: UniCL, count: int) -> tuple[int, int, Tensor]:
                return _kept_bytes(one, encode, make(count), precision, device_type)

            (few, _, features), (more, _, _) = measured(model, 2), measured(model, 4)
            of_one = (more - few) // 2
            again = 0
            # backward recomputes one block at a time; frozen blocks are computed like that, too
            is_frozen = any(name.startswith(f"{tower}_encoder.") for name in model.frozen.names)
            if config.efficiency.activation_checkpointing or is_frozen:
                again = (measured(plain, 4)[1] - measured(plain, 2)[1]) // 2
            return of_one + again, few - 2 * of_one, features.shape[1]

        image_bytes, narrow_bytes, width = kept("image", UniCL.encode_image, images)
        text_bytes = 0
        if model.text_encoder is not None:
            text_bytes, more_narrow, _ = kept(
                "text", lambda one, rows: one.encode_text(rows, rows.numel()), texts
            )
            narrow_bytes += more_narrow
    in_blocks = [_num_parameters(block) for block in find_blocks(model)]
    divided = [
        (each.shape, each.requires_grad) for one in model.encoders for each in one.parameters()
    ]
    return _Encoders(
        num_parameters=_num_parameters(model),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        narrow_bytes=narrow_bytes,
        image_bytes=image_bytes,
        text_bytes=text_bytes,
        feature_width=width,
        trainable_sizes=tuple(p.numel() for p in model.parameters() if p.requires_grad),
        divided_shapes=tuple(divided),
        largest_block=max(in_blocks, default=0),
        outside_blocks=sum(shape.numel() for shape, _ in divided) - sum(in_blocks),
    )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kept_bytes(
    model: UniCL, encode: _EncodeOne, inputs: Tensor, precision: Precision, device_type: str
) -> tuple[int, int, Tensor]:
    """Bytes that a forward pass saves for backward, in all and in its largest block; the result."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}
    blocks: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    def total() -> int:
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)

    def end(*_: Any) -> None:
        blocks[-1] += total()

    with contextlib.ExitStack() as stack:
        for block in find_blocks(model):
            begin = block.register_forward_pre_hook(lambda *_: blocks.append(-total()))
            stack.callback(begin.remove)
            stack.callback(block.register_forward_hook(end).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor))
        stack.enter_context(precision.autocast("cpu"))
        if device_type == "cuda" and precision.compute_type.itemsize == 2:
            stack.enter_context(_WideOnCuda())
        features = encode(model, inputs)
    return total(), max(blocks, default=0), features


class _WideOnCuda(TorchFunctionMode):
    """Autocast's rules for CUDA that the CPU lacks: these functions are computed in fp32."""

    _FUNCTIONS = frozenset({F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FUNCTIONS:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))
