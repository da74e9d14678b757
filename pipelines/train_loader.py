"""From packed data sets to an endless stream of batches.

`TrainLoader._iterate` is the top: `steps.py` plans, `read/` reads, and a DALI graph makes the crops
(`graph.py`, `running.py`), or `crops.py` does if images are small or stored decoded.
"""

import contextlib
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unicl_fast.augmentation import augmentations_of
from unicl_fast.batch import Batch, OneIterator, ReadingTime
from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.stages import Span
from unicl_fast.system.machine import choose_decode_device
from unicl_fast.text.prompts import ClassPrompts

from .crops import CropBatches, are_small_jpegs
from .graph import build_train_graph, is_fused
from .host_batches import HostBatches, ImageForm, mean_image_bytes
from .kernels.operators import parts_for
from .plan.plan import PlannedBatch, TrainPlan, source_of
from .read.samples import SampleReader
from .running import DecodingError, Outputs, choose_pace, decode, find_undecodable, reason_of
from .steps import LoaderSettings, RankSteps, TrainMetadata
from .trial import try_decoder


class TrainLoader(OneIterator):
    """One rank's batches of a run; implements `unicl_fast.batch.Loader`.

    A batch is the same whichever step iterating begins at, and the batches of all ranks join to the
    same global batch for any number of ranks. Bad samples are replaced and change nothing else.

    Other libraries' loops iterate over it and save its `state_dict` with the model's: iterating
    continues after the last batch handed out, or where `load_state_dict` says, to the run's end.
    """

    def __init__(
        self,
        config: LoaderSettings,
        datasets: Sequence[PackedDataset],
        weights: Sequence[float] | None,
        prompts: ClassPrompts,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        quarantine: Path | None = None,
        spans: tuple[Span, ...] = (),
        stage: int = -1,
    ) -> None:
        """Checks that the data can be planned and that the ranks can share a batch.

        Args:
            config: the run's, or a stage's.
            datasets: to train on, open; the caller closes them.
            weights: each data set's part of every batch; None uses the numbers of samples.
            prompts: made from the same data sets in the same order.
            rank: number of this loader's local batch.
            world_size: how many there are in a global batch.
            device: where batches end up; `data.decode_device` says whether it decodes images.
            quarantine: the file that lists bad samples, shared by all ranks; None writes none.
            spans: those of a run in stages.
            stage: number of the stage that `config` is for.

        Raises:
            ValueError: stages, data that cannot be planned or shared, or a decoder that fails.
        """
        if config.run.stages:
            raise ValueError(
                "a TrainLoader is of one stage: make one of each of config.stages, with "
                "spans=config.run.spans, or train by unicl_fast.training.run"
            )
        data, batch_size = config.data, config.run.global_batch_size
        self._run, self._next_step = config.run, 0
        self._rank, self._device = rank, torch.device(device)
        self._decode_device = decoder_of(data, self._device)
        self.form = _form_of(datasets, data, self._decode_device)
        if self._decode_device.type == "cuda" and self.form == "files":
            try_decoder(datasets, data, self._decode_device)
        augmentations = augmentations_of(data.augment, [dataset.location for dataset in datasets])
        self.augmentation = parts_for(augmentations, data.mean)
        self.build_graph = partial(
            build_train_graph,
            data=data,
            device=self._decode_device,
            form=self.form,
            augmentation=self.augmentation,
        )
        self.plan = TrainPlan(
            [source_of(dataset, prompts, data, number) for number, dataset in enumerate(datasets)],
            data=data,
            global_batch_size=batch_size,
            seed=config.run.seed,
            weights=weights,
            augmentations=augmentations,
            spans=spans,
            stage=stage,
        )
        ranks = {"rank": rank, "world_size": world_size}
        self.steps = RankSteps(config, datasets, prompts, self.plan, **ranks, quarantine=quarantine)
        part = sum(data.crop_scale) / 2 if self.form == "files" else 0  # of an image, in a window
        self.pace = choose_pace(
            data,
            self._decode_device,
            num_images=self.steps.batch_size,
            window_bytes=part * mean_image_bytes(datasets, data),
        )
        self.host = _host_side(self.steps, data, self.form)
        """Reads the images of steps."""

    @property
    def reading(self) -> ReadingTime:
        """How long reading waited for storage; several loaders may count together."""
        return self.host.reading

    @reading.setter
    def reading(self, reading: ReadingTime) -> None:
        self.host.reading = reading

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches of the steps `start_step`, `start_step + 1`, ... without end.

        One iterator runs at a time: requesting another one closes the one before.

        Raises:
            DecodingError: decoding fails, and no image is the cause.
            TooManyBadSamplesError: so many samples are bad that none can be fed.
            DamagedDatasetError: a data set's arrays were cut short meanwhile.
        """
        copies_to = None if self._device == self._decode_device else self._device
        return self._begin(self._iterate(start_step), copies_to=copies_to)

    def __iter__(self) -> Iterator[Batch]:
        """The run's remaining batches; without end if the run has no length."""
        total = self._run.total_steps
        left = itertools.islice(
            self.batches(self._next_step), max(0, total - self._next_step) if total else None
        )
        for batch in left:
            self._next_step = batch.step + 1
            yield batch

    def __len__(self) -> int:
        """Steps of the whole run; raises TypeError if it has no length."""
        if not self._run.total_steps:
            raise TypeError("the run has no length: give run.steps or run.samples")
        return self._run.total_steps

    def state_dict(self) -> dict[str, Any]:
        """The next step to hand out, and what must be equal to resume; the same on all ranks."""
        batch = {"seed": self._run.seed, "global_batch_size": self._run.global_batch_size}
        return {"next_step": self._next_step, **batch, "num_samples": self.plan.sizes}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Lets iterating begin where another loader of the same run stopped.

        Raises ValueError if seed, global batch size or numbers of samples differ.
        """
        own = self.state_dict()
        for name in own.keys() - {"next_step"}:
            if state_dict[name] != own[name]:
                raise ValueError(
                    f"the state is of a loader with {name} = {state_dict[name]}, this one has "
                    f"{own[name]}: resume with the data and settings that the run began with"
                )
        self._next_step = int(state_dict["next_step"])

    def _iterate(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from a step on; after a failure, again from the failed one with substitutes."""
        step = start_step
        while True:
            try:
                with (
                    self.steps.reading_ahead(step),
                    contextlib.closing(self._outputs(step)) as outputs,
                ):
                    # starmap holds no batch: while one is held, its buffer cannot be reused
                    yield from itertools.starmap(
                        lambda images, metadata: metadata.with_images(images), outputs
                    )
                return
            except DecodingError as error:
                # Not the error itself: through its traceback it would keep the dead graph alive
                # next to the one that looks for the cause.
                failed, reason = error.in_flight, reason_of(error)
            step = failed[0].actual.step
            if self.form != "files":  # nothing is decoded, so no image is the cause
                raise DecodingError(f"step {step}, rank {self._rank}: the graph fails: {reason}")
            if not any(self._find_bad(metadata.actual) for metadata in failed):
                raise DecodingError(
                    f"step {step}, rank {self._rank}: decoding fails, though each image can be "
                    f"decoded alone: {reason}"
                )

    def _outputs(self, start_step: int) -> Outputs[TrainMetadata]:
        """Images of every batch, and its metadata."""
        if isinstance(self.host, CropBatches) and self.augmentation is None:  # no graph is needed
            return self.host.batches_in_threads(start_step, ahead=self.pace.ahead)
        return decode(
            self.build_graph,
            self.host.batches(start_step),
            batch_size=self.steps.batch_size,
            device=self._decode_device,
            pace=self.pace,
        )

    def _find_bad(self, failed: PlannedBatch) -> bool:
        """Finds what the decoder refuses of a batch; whether it will hold other samples now."""
        batch = next(self.host.batches(failed.step))
        actual = batch.metadata.actual
        reasons = find_undecodable(self.build_graph, batch.inputs, device=self._decode_device)
        rows = list(reasons)
        pairs = zip(actual.source_ids[rows].tolist(), actual.sample_ids[rows].tolist(), strict=True)
        self.steps.bad.mark_undecodable(
            (*pair, reason) for pair, reason in zip(pairs, reasons.values(), strict=True)
        )
        return bool(reasons) or not np.array_equal(actual.sample_ids, failed.sample_ids)


def _host_side(steps: RankSteps, data: DataConfig, form: ImageForm) -> HostBatches | CropBatches:
    are_decoded = all(dataset.is_decoded for dataset in steps.datasets)
    reading = ReadingTime(decodes_files=form == "files" or not are_decoded)
    # a decoder that is given files of both kinds needs the headers of raw ones
    headers = form == "files" or not are_decoded
    reader = SampleReader(steps.datasets, steps.bad, max_pixels=data.max_pixels, headers=headers)
    if form == "crops":
        return CropBatches(steps, reader, data, reading=reading)
    shape = steps.datasets[0].image_shape if form == "pixels" else None
    return HostBatches(steps, reader, image_shape=shape, reading=reading)


def decoder_of(data: DataConfig, device: torch.device) -> torch.device:
    """The device that decodes the images of a run on a device."""
    return choose_decode_device(data.decode_device, device=device, threads=data.threads)[0]


def _form_of(
    datasets: Sequence[PackedDataset], data: DataConfig, device: torch.device
) -> ImageForm:
    """Crops for decoded images and small JPEGs, if the fused resizer may make them."""
    decoded = all(dataset.is_decoded for dataset in datasets)
    if is_fused(data.resample, device) and (decoded or are_small_jpegs(datasets, data)):
        return "crops"
    shapes = {dataset.image_shape for dataset in datasets}
    return "pixels" if len(shapes) == 1 and None not in shapes else "files"
