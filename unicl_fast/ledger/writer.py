"""Records the samples fed at every step, to be proven afterwards (`unicl-ledger`).

All ranks flush their records before a checkpoint of the same steps begins, so records lost in a
crash belong to steps that the next start repeats.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from unicl_fast.batch import Batch
from unicl_fast.dataset.arrays import WEIGHT_DTYPE, npy_header
from unicl_fast.dataset.weights import Weights
from unicl_fast.distributed.ranks import Ranks, gather_integers
from unicl_fast.ledger.format import (
    SegmentHeader,
    encode_header,
    encode_record,
    list_segments,
    segment_name,
    weights_path,
)
from unicl_fast.stages import Span, span_at
from unicl_fast.system.atomic_files import flush_to_disk, is_at, replacing
from unicl_fast.system.untrusted_files import open_regular

logger = logging.getLogger(__name__)

# Records that a full disk rejected wait in memory; beyond this the run stops.
_MOST_WAITING_BYTES = 64 << 20
# A rank's answer whether its records are on disk.
_ON_DISK, _NOT_WRITTEN, _LOST = range(3)


class Ledger:
    """One rank's ledger of a run."""

    def __init__(
        self,
        folder: Path,
        header: SegmentHeader,
        *,
        spans: Sequence[Span] = (),
        weights: Mapping[int, Weights] = {},
        ranks: Ranks | None = None,
    ) -> None:
        """Writes nothing yet. All ranks and starts of a run share `folder`.

        `header` describes the run and this rank. `weights` are those of the sources that are drawn
        by weight, which the proof needs.
        """
        self.folder = folder
        digests = {number: xxhash.xxh3_64_hexdigest(one.data) for number, one in weights.items()}
        self._weights = {digests[number]: one for number, one in weights.items()}
        sources = [
            dataclasses.replace(one, weights=digests.get(number, ""))
            for number, one in enumerate(header.sources)
        ]
        self._header = dataclasses.replace(header, sources=tuple(sources))
        self._ranks = ranks or Ranks()
        self._spans = spans if len(spans) > 1 else ()
        self._sizes = np.array([source.num_samples for source in sources], dtype=np.int64)
        self._file = -1
        self._path = folder
        self._next_step = 0
        self._waiting = bytearray()
        self._failure: OSError | None = None

    @contextlib.contextmanager
    def segment(self, step: int, *, run_id: str = "") -> Iterator[None]:
        """Opens a segment whose first record is of `step`, or raises OSError; a collective call."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for digest, weights in self._weights.items() if self._ranks.is_main else ():
            path = weights_path(self.folder, digest)
            if not path.exists():
                with replacing(path) as aside:
                    header = npy_header(WEIGHT_DTYPE, weights.shape)
                    aside.write_bytes(header + weights.tobytes())
        newest = max(list_segments(self.folder), default=0)
        # another rank may already have opened a stage's segment when both ended
        number = 1 + max(gather_integers(newest, self._ranks))
        self._header = dataclasses.replace(self._header, run_id=run_id, follows=False)
        try:
            self._open(number, step)
            if number == 1 and step and self._ranks.is_main:
                logger.warning(
                    "the ledger begins at step %d: what was fed before cannot be proven", step
                )
            yield
        finally:
            if self._file >= 0:
                self._write()
                os.close(self._file)
            self._file = -1

    def _open(self, number: int, step: int) -> None:
        """Opens this rank's file of segment `number`, whose first record is of `step`."""
        header = dataclasses.replace(self._header, segment=number, start_step=step)
        if self._spans:
            span = span_at(self._spans, step)
            header = dataclasses.replace(
                header,
                global_batch_size=span.global_batch_size,
                first_draw=span.draws_before(step),
                last_batch_size=self._spans[-1].global_batch_size,
            )
        self._header, self._path = header, self.folder / segment_name(number, self._ranks.rank)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._file, _ = open_regular(self._path, flags)
        self._waiting = bytearray(encode_header(header))
        self._next_step = step
        self._write()
        flush_to_disk(self.folder)  # so that the file's name survives a power cut, too

    def _open_next_stage(self) -> None:
        """Closes the file of a finished stage, which must be completely on disk, and opens one."""
        self._write()
        if self._failure is not None or not is_at(self._file, self._path):
            raise OSError(
                f"the ledger in {self.folder} cannot be written "
                f"({self._failure or 'its file was moved or removed'}), and another stage of the "
                "run begins: make room there, or put it back"
            )
        os.fdatasync(self._file)
        os.close(self._file)
        self._file = -1
        self._header = dataclasses.replace(self._header, follows=True)
        self._open(self._header.segment + 1, self._next_step)

    def record(self, batch: Batch) -> None:
        """Hands a finished step's record to the kernel, which keeps it if we are killed.

        Raises:
            ValueError: the batch lacks ids, or has ids that its sources do not have.
            OSError: writing failed for so long that memory would fill, or until the next stage.
        """
        assert self._file >= 0, "records belong into a segment"
        assert batch.step == self._next_step, f"step {batch.step} came after {self._next_step - 1}"
        if batch.source_ids is None or batch.scheduled_ids is None or batch.sample_ids is None:
            raise ValueError(
                "a ledger needs a loader whose batches have source_ids, scheduled_ids and "
                "sample_ids; use one that has, or train without a ledger"
            )
        source_ids = batch.source_ids.numpy()
        scheduled_ids, shown_ids = batch.scheduled_ids.numpy(), batch.sample_ids.numpy()
        if source_ids.min() < 0 or source_ids.max() >= len(self._sizes):
            raise ValueError(f"step {batch.step} has source ids beyond {len(self._sizes)} sources")
        sizes = self._sizes[source_ids]
        for column in (scheduled_ids, shown_ids):
            if column.min() < 0 or (column >= sizes).any():
                raise ValueError(f"step {batch.step} has sample ids that its sources do not have")
        if any(self._header.start_step < span.first_step == batch.step for span in self._spans):
            self._open_next_stage()
        self._waiting += encode_record(
            self._header,
            step=batch.step,
            source_ids=source_ids,
            scheduled_ids=scheduled_ids,
            shown_ids=shown_ids,
        )
        self._next_step += 1
        self._write()
        if self._failure is not None and len(self._waiting) > _MOST_WAITING_BYTES:
            raise OSError(
                f"the ledger in {self.folder} could not be written for too long: {self._failure}"
            )

    def flush(self, *, required: bool) -> bool:
        """Whether all ranks' records so far are on disk; a collective call before a checkpoint.

        A checkpoint of steps that a rank has not recorded would leave a hole in the ledger if that
        rank died now.

        Raises OSError: they are not, and are `required` (else an error is logged), or a rank's file
        was moved or removed, or its disk failed: its content cannot be written again.
        """
        self._write()
        is_there, reason = True, self._failure
        if self._failure is None:
            try:
                os.fdatasync(self._file)
                # writing to a removed file succeeds
                is_there = is_at(self._file, self._path)
            except OSError as error:  # which Linux reports once, and then forgets the records
                is_there, reason = False, error
        code = _NOT_WRITTEN if self._failure else _ON_DISK if is_there else _LOST
        codes = gather_integers(code, self._ranks)
        if not any(codes):
            return True
        ranks = ", ".join(str(rank) for rank, code in enumerate(codes) if code == max(codes))
        because = f" ({reason})" if reason else ""
        if _LOST in codes:
            raise OSError(
                f"the ledger in {self.folder} was moved or removed, or its disk failed{because}, "
                f"while rank {ranks} wrote to it: the records from step {self._header.start_step} "
                "on are not there, and a later checkpoint would leave a hole. Put it back and "
                "resume; without it, the run resumes from its newest checkpoint, and what was fed "
                "before cannot be proven"
            )
        message = (
            f"the ledger in {self.folder} cannot be written by rank {ranks}{because}, and a "
            "checkpoint without it would leave a hole: make room there"
        )
        if required:
            raise OSError(message)
        if self._ranks.is_main:
            logger.error(
                "NO CHECKPOINT of step %d: %s; training continues", self._next_step, message
            )
        return False

    def _write(self) -> None:
        """Hands waiting records to the kernel, in one call unless the disk is full."""
        try:
            while self._waiting:
                written = os.write(self._file, self._waiting)
                del self._waiting[:written]
        except OSError as error:
            if self._failure is None:
                logger.error(
                    "THE LEDGER CANNOT BE WRITTEN in %s: %s; its records wait in memory, and no "
                    "checkpoint is written before they are down", self.folder, error,
                )  # fmt: skip
            self._failure = error
        else:
            if self._failure is not None:
                logger.warning("the ledger can be written again")
            self._failure = None
