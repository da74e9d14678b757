"""Training steps/s, beside open_clip's own.

    unicl-bench step --data PACKED [--json FILE]

Both train the same timm image encoder and the same text encoder on the same images and texts, from
the same weights; their features, the gradients of all their weights and (on captions) their losses
are compared. open_clip's step is written as its training script does it, with the best of its flags
on a CPU: bf16 autocast. It gets its images normalised already; ours are counted from the bytes that
the decoder gives. unicl-pretrain keeps freed memory (unicl_fast/system/machine.py), open_clip's
script does not, and gains more by it. Without --tune-contender, neither does it here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import (
    DataConfig,
    DeviceName,
    EfficiencyConfig,
    ModelConfig,
    PrecisionName,
    RunConfig,
    TrainConfig,
)
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.precision import normalise_images
from unicl_fast.models.unicl import UniCL
from unicl_fast.presets import build_preset
from unicl_fast.system.machine import keep_freed_memory
from unicl_fast.training.global_loss import global_loss
from unicl_fast.training.trainer import Trainer

from ..harness import Stage, rate_of, ratio_of, take_turns

_ROUNDING = 1e-4
"""Largest difference that two orders of the same fp32 arithmetic may cause, relative to the largest
entry."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStage(Stage):
    """Options of stages that train a timm model and the paper's text encoder on the CPU."""

    image_encoder: str = "swin_tiny_patch4_window7_224"
    """A timm model."""
    image_size: int = 224
    """Side of the images."""
    batch_size: int = 32
    """Images of a step."""
    device: DeviceName = "auto"
    """Device that runs the step."""

    def config(self, precision: PrecisionName) -> TrainConfig:
        return TrainConfig(
            data=DataConfig(image_size=self.image_size, evaluation_resize=self.image_size),
            model=ModelConfig(image_encoder=self.image_encoder),
            efficiency=EfficiencyConfig(precision=precision),
            run=RunConfig(global_batch_size=self.batch_size, steps=1 << 20, device=self.device),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepStage(ModelStage):
    """Options of stages that do so on a data set."""

    data: Path
    """Packed data set with captions, or with labels (one prompt a class shows the most)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(StepStage):
    """Training steps, beside open_clip's own."""

    tune_contender: bool = False
    """Let the process keep freed memory, as unicl-pretrain does and open_clip's script does not."""

    def run(self) -> None:
        if self.tune_contender:
            keep_freed_memory()
        config = self.config("bf16")
        batch = take_batch(config, self.data)
        trainer = Trainer(config, ListLoader([batch]), progress=False)
        batch = batch.to(trainer.device)
        theirs = build_open_clip(trainer.model, config).to(trainer.device)
        images = normalise_images(batch.images, mean=config.data.mean, std=config.data.std)
        texts = batch.tokens[batch.text_index]
        compare(trainer.model, theirs, batch, images, texts)
        turns = take_turns(
            {
                "unicl_fast": lambda: trainer.train_step(batch),
                "open_clip": open_clip_step(theirs, images, texts),
            },
            rounds=self.rounds,
        )
        figures = {f"{name}, images/s": rate_of(turns[name], self.batch_size) for name in turns}
        figures["ratio"] = ratio_of(turns, "open_clip", "unicl_fast")
        facts = {
            "images": self.batch_size,
            "distinct texts": len(batch.tokens),
            "tokens of distinct texts": int(batch.text_lengths.sum()),
            "tokens of all texts with padding": texts.numel(),
        }
        for name, value in facts.items():
            print(f"{name:46} {value}")
        self.report(figures, "open_clip_torch", "timm", facts=facts)


def long_preset(preset: str, **run: Any) -> TrainConfig:
    """A preset whose run is long; `run` are more fields of its RunConfig."""
    config = build_preset(preset)
    changed = dataclasses.replace(config.run, steps=1 << 20, **run)
    return dataclasses.replace(config, run=changed)


def take_batch(config: TrainConfig, data: Path) -> Batch:
    """The first batch of a run on the data set, copied out of the loader's buffers."""
    from ..input.loaders import open_loader  # with DALI; a step alone needs none

    with (
        PackedDataset(data) as dataset,
        contextlib.closing(open_loader(dataset, config)) as loader,
    ):
        return copy.deepcopy(next(loader.batches(0)))


def build_open_clip(ours: UniCL, config: TrainConfig) -> CLIP:
    """The same model as open_clip builds it, with the same weights."""
    model = config.model
    theirs = CLIP(
        model.embed_dim,
        CLIPVisionCfg(
            timm_model_name=model.image_encoder,
            timm_pool="",  # the network's own, as here
            timm_proj="linear",
            image_size=config.data.image_size,
        ),
        CLIPTextCfg(
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            width=model.text_width,
            heads=model.text_heads,
            layers=model.text_layers,
        ),
        quick_gelu=True,
    )
    for mine, copied in _pairs(ours, theirs, lambda parameter: parameter.data):
        copied.copy_(mine)
    theirs.logit_scale.data.copy_(ours.logit_scale.data)
    assert ours.text_encoder is not None
    for module in [*theirs.transformer.modules(), theirs.ln_final]:
        if isinstance(module, nn.LayerNorm):
            module.eps = ours.text_encoder.ln_final.eps
    return theirs


def _pairs(
    ours: UniCL, theirs: CLIP, take: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Takes each of our weights and open_clip's own of it; the scale, a number, is left out."""
    assert ours.text_encoder is not None
    assert ours.image_projection is not None
    trunk, whole = dict(theirs.visual.trunk.named_parameters()), dict(theirs.named_parameters())
    for name, parameter in ours.image_encoder.named_parameters():
        yield take(parameter), take(trunk[name])
    for name, parameter in ours.text_encoder.named_parameters():
        name = f"transformer.{name}" if name.startswith("resblocks") else name
        yield take(parameter), take(whole[name])
    assert ours.text_projection is not None
    yield take(ours.text_projection), take(theirs.text_projection)
    yield take(ours.image_projection).T, take(theirs.visual.head.proj.weight)


def open_clip_step(model: CLIP, images: Tensor, texts: Tensor) -> Callable[[], object]:
    """A step as open_clip's training script takes it, without ranks and gradient scaling."""
    loss_of = ClipLoss()
    spared = [p for n, p in model.named_parameters() if p.ndim < 2 or "bias" in n or "scale" in n]
    decayed = [p for p in model.parameters() if all(p is not other for other in spared)]
    optimizer = torch.optim.AdamW(
        [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=5e-4
    )
    images = images.contiguous()
    model.train()

    def step() -> object:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = loss_of(*model(images, texts)[:3])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss

    return step


def compare(
    ours: UniCL,
    theirs: CLIP,
    batch: Batch,
    images: Tensor,
    texts: Tensor,
    *,
    rounding: float = _ROUNDING,
) -> None:
    """Raises RuntimeError if features, losses or gradients differ by more than fp32 rounding."""
    ours.eval()
    theirs.eval()
    image_pair = ours.encode_image(images), theirs.encode_image(images, True)
    text_pair = ours.encode_text(batch.tokens)[batch.text_index], theirs.encode_text(texts, True)
    gaps = {"image features": _largest_gap(*image_pair), "text features": _largest_gap(*text_pair)}
    if len(batch.text_class_ids.unique()) == batch.batch_size:  # then UniCL is CLIP
        config = dataclasses.replace(ours.config, efficiency=EfficiencyConfig(precision="fp32"))
        with torch.no_grad():
            gaps["losses"] = _largest_gap(
                global_loss(ours, batch, config, Ranks()), ClipLoss()(*theirs(images, texts)[:3])
            )
    # gradients of the same weighted sum of the features, since on labels the losses differ
    weights = [torch.randn(one.shape, device=one.device) for one, _ in (image_pair, text_pair)]
    for image, text in zip(image_pair, text_pair, strict=True):
        ((image * weights[0]).sum() + (text * weights[1]).sum()).backward()
    gaps["gradients"] = max(_largest_gap(*pair) for pair in _pairs(ours, theirs, _gradient))
    ours.zero_grad()
    theirs.zero_grad()
    for what, gap in gaps.items():
        print(f"{what} differ by at most {gap:.1e} of the largest")
        if not gap < rounding:
            raise RuntimeError(f"the {what} differ by {gap}; nothing was timed")


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a weight has no gradient; nothing was timed")
    return parameter.grad


def _largest_gap(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest entry."""
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))
