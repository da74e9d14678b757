"""Training steps in images/s, compared with open_clip's own: bf16 autocast, its best on a CPU.

Both train the same encoders from the same weights; features, gradients and (on captions) losses are
compared. unicl-pretrain keeps freed memory (unicl_fast/system/machine.py) and open_clip's script
does not, though it gains more by it; without --tune-contender ours does not keep it here either.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from torch import Tensor, nn

from unicl_fast.batch import Batch
from unicl_fast.config import EfficiencyConfig, TrainConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.precision import normalise_images
from unicl_fast.models.unicl import UniCL
from unicl_fast.training.step import global_loss

from ..harness import Figures, printed, rate_of, ratio_of, summarise, take_turns
from ..race.contestants import open_clip_model
from .parts import build_trainer

_ROUNDING = {"cpu": 1e-4, "cuda": 1e-3}
"""Largest difference that two orders of the same fp32 arithmetic may cause, relative to the largest
entry."""


def measure_open_clip(config: TrainConfig, batch: Batch, *, rounds: int) -> Figures:
    """Rates of both steps; RuntimeError if the two models differ."""
    trainer, batch = build_trainer(config, batch)
    theirs, images, texts = open_clip_twin(trainer.model, batch)
    turns = take_turns(
        {
            "unicl_fast": lambda: trainer.train_step(batch),
            "open_clip": open_clip_step(theirs, images, texts),
        },
        rounds=rounds,
        device_type=trainer.device.type,
    )
    figures = {f"{name}, images/s": rate_of(turns[name], batch.batch_size) for name in turns}
    figures["ratio"] = ratio_of(turns, "open_clip", "unicl_fast")
    counts = {
        "distinct texts": len(batch.texts.tokens),
        "tokens of distinct texts": int(batch.texts.lengths.sum()),
        "tokens of all texts with padding": texts.numel(),
    }
    return printed(figures | {name: summarise([count]) for name, count in counts.items()})


def open_clip_twin(ours: UniCL, batch: Batch) -> tuple[CLIP, Tensor, Tensor]:
    """open_clip's model with our weights, and its images and texts; RuntimeError if it differs."""
    data = ours.config.data
    theirs = build_open_clip(ours).to(batch.images.device)
    images = normalise_images(batch.images, mean=data.mean, std=data.std)
    texts = batch.texts.tokens[batch.texts.index]
    compare(ours, theirs, batch, images, texts, rounding=_ROUNDING[images.device.type])
    return theirs, images, texts


def build_open_clip(ours: UniCL) -> CLIP:
    """The same model as open_clip builds it, with the same weights."""
    theirs = CLIP(**open_clip_model(ours.config))
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
    rounding: float,
) -> None:
    """Raises RuntimeError if features, losses or gradients differ by more than fp32 rounding."""
    ours.eval()
    theirs.eval()
    image_pair = ours.encode_image(images), theirs.encode_image(images, True)
    text_pair = (
        ours.encode_text(batch.texts.tokens)[batch.texts.index],
        theirs.encode_text(texts, True),
    )
    gaps = {"image features": _largest_gap(*image_pair), "text features": _largest_gap(*text_pair)}
    if len(batch.targets.text_class_ids.unique()) == batch.batch_size:  # then UniCL is CLIP
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
