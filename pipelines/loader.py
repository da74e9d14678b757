"""From packed data sets to batches: without end for training, each sample once for evaluation.

`TrainLoader._outputs` gets a step's images, texts and targets from `feed/`, the images by way of a
DALI graph (`graph.py`) unless they are small or stored decoded; `_batch_of` makes its `Batch`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.augmentation import augmentations_of
from unicl_fast.batch import Batch, EvaluationBatch, ReadingTime, copied_ahead
from unicl_fast.config import DataConfig
from unicl_fast.dataset.feature_files import FeatureFile
from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset
from unicl_fast.images.codec import JPEG_BEGINS
from unicl_fast.stages import Span
from unicl_fast.system.machine import choose_decode_device
from unicl_fast.text.prompts import ClassPrompts

from .feed.host_batches import (
    SMALL_IMAGE_BYTES,
    HostBatch,
    HostBatches,
    ImageForm,
    LoaderSettings,
    TrainMetadata,
    image_bytes,
)
from .feed.reading import READ_AHEAD, SampleReader, read_images, reading_ahead
from .graph import (
    DecodingError,
    Outputs,
    build_evaluation_graph,
    build_train_graph,
    choose_pace,
    decode,
    find_undecodable,
    is_fused,
    reason_of,
)
from .kernels.operators import parts_for
from .plan.crop import evaluation_regions, fill_borders
from .plan.plan import PlannedBatch, PlanSource, TrainPlan
from .trial import try_decoder

_SAMPLES_LOOKED_AT = 4


class TrainLoader:
    """One rank's batches of a run; implements `unicl_fast.batch.Loader`.

    Other libraries' loops iterate over it, and save its `state_dict` with the model's: iterating
    begins at the step after the last batch that was handed out, or where `load_state_dict` says, on
    as many ranks or others. It ends with the run, whose steps are its length.

    Batches are the same whatever step they are asked from, and the ranks' batches of one step join
    to the same global batch whatever their number. Bad samples are replaced, and change nothing
    else.
    """

    _running: Generator[Batch, None, None] | None = None
    _feature_type: torch.dtype | None = None

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
            config: the run's.
            datasets: to train on, open; the caller closes them.
            weights: each data set's part of every batch; None takes the numbers of samples.
            prompts: made of the same data sets in the same order.
            rank: number of this loader's local batch.
            world_size: how many there are in a global batch.
            device: where batches lie; `data.decode_device` says whether images are decoded there.
            quarantine: the file that lists bad samples, shared by all ranks; None writes none.
            spans: those of the run, if it has stages, of which `config` is number `stage`.
            stage: see `spans`.

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
            [_plan_source(dataset, prompts, data, i) for i, dataset in enumerate(datasets)],
            data=data,
            global_batch_size=batch_size,
            seed=config.run.seed,
            weights=weights,
            augmentations=augmentations,
            spans=spans,
            stage=stage,
        )
        self.plan.batch(0, rank=rank, world_size=world_size)  # refuses what cannot be shared, now
        self.num_images = self.plan.num_views * (batch_size // world_size)
        part = sum(data.crop_scale) / 2 if self.form == "files" else 0  # of an image, in a window
        size = part * image_bytes(datasets, data)
        self.pace = choose_pace(
            data, self._decode_device, num_images=self.num_images, window_bytes=size
        )
        self._reader = SampleReader(datasets, self.plan, quarantine, max_pixels=data.max_pixels)
        self.host = HostBatches(
            config,
            list(datasets),
            prompts,
            self.plan,
            self._reader,
            rank=rank,
            world_size=world_size,
            form=self.form,
        )

    @property
    def reading(self) -> ReadingTime:
        """How long reading waited for storage; several loaders may count together."""
        return self.host.reading

    @reading.setter
    def reading(self, reading: ReadingTime) -> None:
        self.host.reading = reading

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches of the steps `start_step`, `start_step + 1`, ... without end.

        One iterator runs at a time: asking for another closes the one before.

        Raises:
            DecodingError: decoding fails, and no image is the cause.
            TooManyBadSamplesError: so many samples are bad that none can be fed.
            DamagedDatasetError: a data set's arrays were cut short meanwhile.
        """
        self.close()
        self._running = self._iterate(start_step)
        lie_on = self._decode_device if self._feature_type is None else torch.device("cpu")
        if self._device != lie_on:
            self._running = copied_ahead(self._running, self._device)
        return self._running

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left of the run; without end if the run has no length."""
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

    def feed_features(self, features: Sequence[FeatureFile]) -> None:
        """Feeds stored features of a frozen encoder in place of images from now on.

        `features` are those of each data set, of one type. Nothing is drawn for the images.
        """
        self.close()
        self.form, self._feature_type = "features", getattr(torch, features[0].dtype)
        self.host.feed_features(features)

    def metadata_without_decoding(self, num_steps: int) -> Iterator[TrainMetadata]:
        """Metadata of the first steps, each read and not decoded: for measuring storage."""
        with self.host.reading_ahead(0), contextlib.closing(self.host.batches(0)) as batches:
            for batch in itertools.islice(batches, num_steps):
                yield batch.metadata

    def close(self) -> None:
        """Stops decoding and frees its buffers; batches that are still held stay valid."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _iterate(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from a step on; after a failure, again from the failed one with substitutes."""
        step = start_step
        while True:
            try:
                yield from self._decode(step)
            except DecodingError as error:
                # Not the error itself: through its traceback it would keep the dead graph alive
                # next to the one that looks for the cause.
                failed, reason = error.in_flight, reason_of(error)
            else:
                return
            step = failed[0].actual.step
            if self.form != "files":  # nothing is decoded, so no image is the cause
                raise DecodingError(f"step {step}, rank {self._rank}: the graph fails: {reason}")
            if not any(self._find_bad(metadata.actual) for metadata in failed):
                raise DecodingError(
                    f"step {step}, rank {self._rank}: decoding fails, though each image can be "
                    f"decoded alone: {reason}"
                )

    def _decode(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from a step on, until there is one that cannot be decoded."""
        with (
            self.host.reading_ahead(start_step),
            contextlib.closing(self._outputs(start_step)) as outputs,
        ):
            for images, metadata in outputs:
                yield self._batch_of(images, metadata)
                del images  # held here, its buffer could not be reused

    def _batch_of(self, images: Tensor, metadata: TrainMetadata) -> Batch:
        first, *second = images.chunk(self.plan.num_views)
        actual = metadata.actual
        batch = Batch(
            step=actual.step,
            images=first,
            second_images=second[0] if second else None,
            texts=metadata.texts,
            targets=metadata.targets,
            global_index=torch.from_numpy(actual.global_index),
            sample_ids=torch.from_numpy(actual.sample_ids),
            scheduled_ids=torch.from_numpy(metadata.scheduled_ids),
            source_ids=torch.from_numpy(actual.source_ids.astype(np.int64)),
        )
        return batch.to(images.device) if images.is_cuda else batch

    def _outputs(self, start_step: int) -> Outputs[TrainMetadata]:
        """Images of every batch, and its metadata."""
        if self._feature_type is not None:
            for batch in self.host.batches(start_step):
                yield torch.from_numpy(*batch.inputs).view(self._feature_type), batch.metadata
        elif self.form == "crops" and self.augmentation is None:  # nothing is left for a graph
            made = self.host.batches_without_graph(start_step, ahead=self.pace.ahead)
            with contextlib.closing(made):
                for batch in made:
                    yield torch.from_numpy(*batch.inputs), batch.metadata
        else:
            yield from decode(
                self.build_graph,
                self.host.batches(start_step),
                batch_size=self.num_images,
                device=self._decode_device,
                pace=self.pace,
            )

    def _find_bad(self, failed: PlannedBatch) -> bool:
        """Finds what the decoder refuses of a batch; whether it will hold other samples now."""
        batch = self.host.batch(failed.step)
        actual = batch.metadata.actual
        reasons = find_undecodable(self.build_graph, batch.inputs, device=self._decode_device)
        for row, reason in reasons.items():
            row %= len(actual.sample_ids)  # of the second view
            source, sample = int(actual.source_ids[row]), int(actual.sample_ids[row])
            self._reader.mark_undecodable([(source, sample, reason)])
        return bool(reasons) or not np.array_equal(actual.sample_ids, failed.sample_ids)


def decoder_of(data: DataConfig, device: torch.device) -> torch.device:
    """The device that decodes the images of a run on a device."""
    return choose_decode_device(data.decode_device, device=device, threads=data.threads)[0]


def _form_of(
    datasets: Sequence[PackedDataset], data: DataConfig, device: torch.device
) -> ImageForm:
    """Decoded images and small JPEGs need no graph; or one that resizes images of one size."""
    decoded = all(dataset.is_decoded for dataset in datasets)
    if is_fused(data.resample, device) and (decoded or _are_small_jpegs(datasets, data)):
        return "crops"
    shapes = {dataset.image_shape for dataset in datasets}
    return "pixels" if len(shapes) == 1 and None not in shapes else "files"


def _are_small_jpegs(datasets: Sequence[PackedDataset], data: DataConfig) -> bool:
    """Whether images are small, and the first of each data set JPEGs; packing has shuffled them."""
    try:
        return image_bytes(datasets, data) <= SMALL_IMAGE_BYTES and all(
            dataset.is_decoded or dataset.image_bytes(sample)[:2].tobytes() == JPEG_BEGINS
            for dataset in datasets
            for sample in range(min(_SAMPLES_LOOKED_AT, len(dataset)))
        )
    except DamagedSampleError:
        return False


def _plan_source(
    dataset: PackedDataset, prompts: ClassPrompts, data: DataConfig, number: int
) -> PlanSource:
    labels = np.arange(prompts.num_classes[number])
    hierarchy = dataset.manifest.hierarchy if data.prompts == "levels" else None
    chains = None
    if hierarchy is not None:
        of_labels = hierarchy.chains()
        starts = np.cumsum([0, *map(len, of_labels)], dtype=np.int64)
        chains = starts, np.array([one for chain in of_labels for one in chain], dtype=np.int64)
    return PlanSource(
        name=dataset.location,
        samples=dataset.samples,
        labels=dataset.labels,
        num_templates=int(prompts.num_templates[number]),
        class_ids=prompts.classes_of(number, labels),
        chains=chains,
    )


class EvaluationLoader:
    """Images of one data set for evaluation; implements `unicl_fast.batch.EvaluationLoader`.

    Rank r of w shows the samples r, r + w, r + 2 w, ...: over all ranks each sample exactly once,
    without padding, so that counts can be summed. May be iterated any number of times.

    Nothing is replaced: an accuracy over other images than those of the data set would be another
    number. An image that cannot be read or decoded ends the evaluation, with its name.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        data: DataConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """As for `TrainLoader`; `batch_size` is this rank's, its last batch may be smaller."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        self._dataset = dataset
        self._data, self._batch_size = data, batch_size
        self._device = torch.device(device)
        self._decode_device = decoder_of(data, self._device)
        if self._decode_device.type == "cuda":
            try_decoder([dataset], data, self._decode_device)
        self._build = partial(build_evaluation_graph, data=data, device=self._decode_device)
        self.pace = choose_pace(
            data,
            self._decode_device,
            num_images=batch_size,
            window_bytes=image_bytes([dataset], data),
        )
        ids = np.arange(rank, len(dataset), world_size, dtype=np.int64)
        self._batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Iterates over the images once.

        Raises:
            DamagedSampleError: an image's bytes are gone or not those that were packed, or it has
                more than `data.max_pixels`.
            DecodingError: images that the decoder refuses; names them.
        """
        batches = self._decode()
        if self._device != self._decode_device:
            batches = copied_ahead(batches, self._device)
        return batches

    def _decode(self) -> Generator[EvaluationBatch, None, None]:
        if not self._batches:
            return
        outputs = decode(
            self._build,
            self._host_batches(),
            batch_size=len(self._batches[0]),
            device=self._decode_device,
            pace=self.pace,
        )
        try:
            with contextlib.closing(outputs):
                for images, ids in outputs:
                    sizes = self._dataset.samples[ids]
                    fill_borders(images, sizes["height"], sizes["width"], self._data)
                    yield EvaluationBatch(images=images, sample_ids=torch.from_numpy(ids))
                    del images
            return
        except DecodingError as error:
            failed, reason = error.in_flight, reason_of(error)
        for ids in failed:
            inputs = self._host_batch(ids).inputs
            reasons = find_undecodable(self._build, inputs, device=self._decode_device)
            if reasons:
                raise DecodingError(
                    "cannot be decoded, though the bytes are those that were packed; pack the data "
                    "again without: "
                    + "; ".join(
                        f"{self._dataset.describe(int(ids[row]))}: {reason}"
                        for row, reason in reasons.items()
                    )
                )
        raise DecodingError(
            f"{self._dataset.location}: decoding fails, though each image can be decoded alone: "
            f"{reason}"
        )

    def _host_batches(self) -> Generator[HostBatch[NDArray[np.int64]], None, None]:
        def schedule(batch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
            if batch >= len(self._batches):
                return None
            ids = self._batches[batch]
            return np.zeros(len(ids), np.int32), ids

        num_chunks = -(-READ_AHEAD // self._batch_size)
        with reading_ahead([self._dataset], schedule, num_chunks=num_chunks) as read_ahead_from:
            for batch, ids in enumerate(self._batches):
                read_ahead_from(batch)
                yield self._host_batch(ids)

    def _host_batch(self, ids: NDArray[np.int64]) -> HostBatch[NDArray[np.int64]]:
        self._dataset.check_arrays()
        samples = self._dataset.samples[ids]
        starts, ends = evaluation_regions(samples["height"], samples["width"], self._data)
        limit, sources = self._data.max_pixels, np.zeros(len(ids), np.int32)
        images, sound = read_images([self._dataset], sources, ids, max_pixels=limit)
        files = images.files()
        for row in np.flatnonzero(~sound).tolist():  # tries again, and says what is wrong
            files[row] = self._dataset.image_bytes(ids[row], verify=True, max_pixels=limit)
        return HostBatch(inputs=(files, starts, ends), metadata=ids)
