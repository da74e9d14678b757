"""Training steps/s, beside open_clip's own.

    unicl-bench step --data PACKED [--json FILE]

Both train the same timm image encoder and the same text encoder on the same images and texts,
from the same weights; first their features, the gradients of all their weights and (on captions)
their losses are compared. Then they take turns, a step each. open_clip's step is written as its
training script does it, with the best of its flags on a CPU: bf16 autocast. It gets its images
normalised already; ours are counted from the bytes that the decoder gives. `unicl-bench input`
measures decoding.

unicl-pretrain keeps freed memory (unicl_fast/system/machine.py), open_clip's script does not,
and gains more by it. Without --tune-contender, neither does it here.
"""

from __future__ import annotations

import contextlib
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
    EfficiencyConfig,
    ModelConfig,
    PrecisionName,
    RunConfig,
    TrainConfig,
)
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.precision import normalise_images
from unicl_fast.models.text_encoder import TextEncoder
from unicl_fast.models.unicl import UniCL
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.system.machine import keep_freed_memory
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.global_loss import global_loss
from unicl_fast.training.trainer import Trainer

from ..harness import Stage, rate_of, ratio_of, take_turns

_ROUNDING = 1e-4
"""Largest difference that two orders of the same fp32 arithmetic may cause, relative to the largest
entry."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Stage):
    """Training steps, beside open_clip's own."""

    data: Path
    """Packed data set; with captions, or with labels (one prompt a class shows the most)."""
    image_encoder: str = "swin_tiny_patch4_window7_224"
    """A timm model."""
    image_size: int = 224
    """Side of the images."""
    batch_size: int = 32
    """Images of a step."""
    tune_contender: bool = False
    """Let the process keep freed memory, as unicl-pretrain does and open_clip's script does not."""

    def run(self) -> None:
        if self.tune_contender:
            keep_freed_memory()
        config = step_config(
            self.image_encoder,
            image_size=self.image_size,
            batch_size=self.batch_size,
            precision="bf16",
        )
        batch = take_batch(config, self.data)
        trainer = Trainer(config, ListLoader([batch]), progress=False)
        theirs = build_open_clip(trainer.model, config)
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


def step_config(
    image_encoder: str, *, image_size: int, batch_size: int, precision: PrecisionName
) -> TrainConfig:
    """The config of a training step on the CPU with a timm model and the paper's text encoder."""
    return TrainConfig(
        data=DataConfig(image_size=image_size, evaluation_resize=image_size),
        model=ModelConfig(image_encoder=image_encoder),
        efficiency=EfficiencyConfig(precision=precision),
        run=RunConfig(global_batch_size=batch_size, steps=1000, device="cpu"),
    )


def take_batch(config: TrainConfig, data: Path) -> Batch:
    """The first batch of a run on the data set, copied out of the loader's buffers."""
    with PackedDataset(data) as dataset:
        manifest = dataset.manifest
        prompts = ClassPrompts([(manifest.class_names, manifest.templates)], Tokenizer())
        with contextlib.closing(TrainLoader(config, [dataset], None, prompts)) as loader:
            batch = next(loader.batches(0))
            fields: Any = {one.name: getattr(batch, one.name) for one in dataclasses.fields(batch)}
            tensors = {k: v.clone() for k, v in fields.items() if isinstance(v, Tensor)}
            copied: Batch = dataclasses.replace(batch, **(fields | tensors))
            return copied


def build_open_clip(ours: UniCL, config: TrainConfig) -> CLIP:
    """The same model as open_clip builds it, with the same weights."""
    model, (text_encoder, image_projection) = config.model, _parts(ours)
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
    with torch.no_grad():
        theirs.visual.trunk.load_state_dict(ours.image_encoder.state_dict())
        theirs.visual.head.proj.weight.copy_(image_projection.T)
        theirs.text_projection.copy_(ours.text_projection)
        theirs.logit_scale.copy_(ours.logit_scale)
        text = {_their_name(name): w for name, w in text_encoder.state_dict().items()}
        unknown = theirs.load_state_dict(text, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"open_clip's text encoder has no {', '.join(unknown)}")
    for module in [*theirs.transformer.modules(), theirs.ln_final]:
        if isinstance(module, nn.LayerNorm):
            module.eps = text_encoder.ln_final.eps
    return theirs


def _parts(ours: UniCL) -> tuple[TextEncoder, nn.Parameter]:
    """The text encoder and the image projection, which only UniCL's objective has."""
    assert ours.text_encoder is not None
    assert ours.image_projection is not None
    return ours.text_encoder, ours.image_projection


def _their_name(name: str) -> str:
    """open_clip's name for a weight of our text encoder."""
    return f"transformer.{name}" if name.startswith("resblocks") else name


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
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(*model(images, texts)[:3])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss

    return step


def compare(ours: UniCL, theirs: CLIP, batch: Batch, images: Tensor, texts: Tensor) -> None:
    """Raises RuntimeError if features, losses or gradients differ by more than fp32 rounding."""
    ours.eval()
    theirs.eval()
    image_pair = ours.encode_image(images), theirs.encode_image(images, True)
    text_pair = ours.encode_text(batch.tokens)[batch.text_index], theirs.encode_text(texts, True)
    gaps = {"image features": _largest_gap(*image_pair), "text features": _largest_gap(*text_pair)}
    if len(batch.tokens) == batch.batch_size:  # all texts differ: then UniCL is CLIP
        config = dataclasses.replace(ours.config, efficiency=EfficiencyConfig(precision="fp32"))
        with torch.no_grad():
            gaps["losses"] = _largest_gap(
                global_loss(ours, batch, config, Ranks()), ClipLoss()(*theirs(images, texts)[:3])
            )
    # gradients of the same weighted sum of the features, since on labels the losses differ
    weights = [torch.randn(one.shape) for one, _ in (image_pair, text_pair)]
    for image, text in zip(image_pair, text_pair, strict=True):
        ((image * weights[0]).sum() + (text * weights[1]).sum()).backward()
    gaps["gradients"] = max(_largest_gap(*pair) for pair in _pairs_of_gradients(ours, theirs))
    ours.zero_grad()
    theirs.zero_grad()
    for what, gap in gaps.items():
        print(f"{what} differ by at most {gap:.1e} of the largest")
        if not gap < _ROUNDING:
            raise RuntimeError(f"the {what} differ by {gap}; nothing was timed")


def _pairs_of_gradients(ours: UniCL, theirs: CLIP) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of all weights but the scale, on which features do not depend."""
    trunk = dict(theirs.visual.trunk.named_parameters())
    whole = dict(theirs.named_parameters())
    text_encoder, image_projection = _parts(ours)
    for name, parameter in ours.image_encoder.named_parameters():
        yield _gradient(parameter, name), _gradient(trunk[name], name)
    for name, parameter in text_encoder.named_parameters():
        yield _gradient(parameter, name), _gradient(whole[_their_name(name)], name)
    name = "text_projection"
    yield _gradient(ours.text_projection, name), _gradient(theirs.text_projection, name)
    name = "image_projection"
    yield _gradient(image_projection, name), _gradient(theirs.visual.head.proj.weight, name).T


def _gradient(parameter: nn.Parameter | None, name: str) -> Tensor:
    if parameter is None or parameter.grad is None:
        raise RuntimeError(f"{name} has no gradient; nothing was timed")
    return parameter.grad


def _largest_gap(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest entry."""
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))
