"""The contestants of `unicl-bench resume`: ours and loaders of others, each as its own pages say.

A loop takes a `Task` and the state of its checkpoint, or None at the start, and yields for each
local batch its epoch, its ids, and a function that returns the state to be kept. The data are
records whose content is their id. A mix is three data sets of one size in which an epoch shows each
sample once, so that lost and doubled samples mean the same for all. Each function imports its own
packages.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..input.contenders import MOSAICML, Contender

NUM_SHARDS = 8
"""Files of a data set; ranks times workers divide it."""
_SIDE = 8
_SEED = 7
_BUFFER = 100

Local = tuple[int, Sequence[int], Callable[[], Any]]
"""Epoch and ids of a local batch, and the function that returns the state after it."""
Loop = Iterator[Local]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A rank's part of a run."""

    folder: Path
    """The contestant's own form of the data, one folder a data set."""
    num_sets: int
    samples: int
    """Samples of each data set."""
    batch_size: int
    """Samples of a step over all ranks."""
    rank: int = 0
    world_size: int = 1
    workers: int = 1
    """Worker processes of the rank; threads of ours."""

    @property
    def local_batch(self) -> int:
        return self.batch_size // self.world_size

    @property
    def epoch_size(self) -> int:
        return self.num_sets * self.samples

    @property
    def folders(self) -> list[Path]:
        """The folder of each data set."""
        return [self.folder / str(number) for number in range(self.num_sets)]

    def ids(self, number: int) -> range:
        """The ids of a data set."""
        return range(number * self.samples, (number + 1) * self.samples)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Resumer(Contender):
    """A loader, and what it keeps for resuming."""

    imports: tuple[str, ...]
    """Modules that are imported once, before ranks are forked."""
    packages: tuple[str, ...]
    """Packages whose versions are reported."""
    state: str
    """The documented state; empty if there is none."""


def _resumer(name: str, about: str, *, state: str, prepare: str = "", **more: Any) -> Resumer:
    facts: dict[str, Any] = {
        "kind": "peer",
        "code": f"{__name__}:{name.replace('-', '_')}",
        "prepare": prepare and f"{__name__}:{prepare}",
        "install": f"pip install {' '.join(more['packages'])}",
    }
    return Resumer(name=name, about=about, state=state, **(facts | more))


_STATE_DICT = "state_dict()"
_HUGGING_FACE: dict[str, Any] = {
    "state": _STATE_DICT,
    "prepare": "write_parquet",
    "imports": ("datasets", "torchdata.stateful_dataloader"),
    "packages": ("datasets", "torchdata"),
}
RESUMERS = (
    _resumer(
        "unicl_fast",
        "TrainLoader, of several data sets for the mix",
        kind="ours",
        state="the step",
        prepare="write_packed",
        imports=("unicl_fast.pipelines.train_loader", "unicl_fast.training.data"),
        packages=("nvidia-dali-cuda120",),
    ),
    _resumer(
        "litdata",
        "StreamingDataLoader, shuffled; CombinedStreamingDataset, which iterates over all",
        state=_STATE_DICT,
        prepare="write_litdata",
        imports=("litdata",),
        packages=("litdata",),
    ),
    _resumer(
        "streaming",
        "MosaicML's StreamingDataLoader, shuffled by py1e, stale shared memory cleaned; streams",
        state=_STATE_DICT,
        prepare="write_mds",
        imports=("streaming", "torch.distributed"),
        packages=("mosaicml-streaming",),
        install=MOSAICML,
    ),
    _resumer(
        "grain",
        "MapDataset, shuffled and repeated, in an ElasticIterator; MapDataset.mix",
        state="get_state()",
        imports=("grain", "grain.experimental"),
        packages=("grain",),
    ),
    _resumer(
        "webdataset",
        "shards and a buffer are shuffled; RandomMix, longest; an epoch is begun anew",
        state="",
        prepare="write_tars",
        imports=("webdataset",),
        packages=("webdataset",),
    ),
    _resumer(
        "datasets",
        "streamed, shards shuffled, in torchdata's StatefulDataLoader; interleave_datasets, "
        "all_exhausted_without_replacement",
        **_HUGGING_FACE,
    ),
    _resumer(
        "datasets-buffer",
        f"the same with a shuffle buffer of {_BUFFER}, which its pages say is lost",
        **_HUGGING_FACE,
    ),
    _resumer(
        "datasets-shuffle",
        "shuffle(seed) as it comes: a buffer of 1,000, filled from 10 shards at a time",
        **_HUGGING_FACE,
    ),
    _resumer(
        "torchdata",
        "StatefulDataLoader with StatefulDistributedSampler; nodes.MultiNodeWeightedSampler, "
        "ALL_DATASETS_EXHAUSTED",
        state=_STATE_DICT,
        imports=("torchdata.stateful_dataloader", "torchdata.nodes"),
        packages=("torchdata",),
    ),
)


def unicl_fast(task: Task, state: Any) -> Loop:
    from unicl_fast.config import DataConfig, RunConfig, TrainConfig
    from unicl_fast.dataset.reader import PackedDataset
    from unicl_fast.pipelines.train_loader import TrainLoader
    from unicl_fast.training.data import build_prompts

    whole: dict[str, Any] = {"crop_scale": (1, 1), "crop_ratio": (1, 1), "flip_probability": 0}
    size: dict[str, Any] = {"image_size": _SIDE, "evaluation_resize": _SIDE}
    config = TrainConfig(
        data=DataConfig(threads=task.workers, cache_folder=str(task.folder), **size, **whole),
        run=RunConfig(global_batch_size=task.batch_size, seed=_SEED),
    )
    datasets = list(map(PackedDataset, task.folders))
    prompts = build_prompts(datasets, config)
    loader = TrainLoader(config, datasets, None, prompts, task.rank, task.world_size)
    for batch in loader.batches(state or 0):
        high, low = batch.images[:, 0, 0, :2].T.tolist()
        ids = [256 * one + other for one, other in zip(high, low, strict=True)]
        epoch = batch.step * task.batch_size // task.epoch_size
        yield epoch, ids, functools.partial(int, batch.step + 1)


def write_packed(task: Task) -> None:
    from PIL import Image

    from unicl_fast.packing.build import build_dataset

    for number, folder in enumerate(task.folders):
        source = task.folder / f"source-{number}" / "record"
        source.mkdir(parents=True)
        for one in task.ids(number):
            image = Image.new("RGB", (_SIDE, _SIDE), (one // 256, one % 256, 0))
            image.save(source / f"{one}.png")
        build_dataset([source.parent], folder, format="raw", workers=1, progress=False)


def litdata(task: Task, state: Any) -> Loop:
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset

    sets = [StreamingDataset(str(folder), shuffle=True, seed=_SEED) for folder in task.folders]
    dataset = sets[0] if len(sets) == 1 else CombinedStreamingDataset(sets, seed=_SEED)
    loader = StreamingDataLoader(
        dataset, batch_size=task.local_batch, num_workers=task.workers, drop_last=True
    )
    if state is not None:
        loader.load_state_dict(state)
    while True:
        for batch in loader:
            yield loader.current_epoch - 1, batch.tolist(), loader.state_dict


def write_litdata(task: Task) -> None:
    from litdata import optimize

    for number, folder in enumerate(task.folders):
        optimize(
            fn=_same,
            inputs=list(task.ids(number)),
            output_dir=str(folder),
            chunk_size=task.samples // NUM_SHARDS,
            num_workers=1,
        )


def _same(record: int) -> int:
    return record


def streaming(task: Task, state: Any) -> Loop:
    from streaming import Stream, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.distributed import init_process_group

    init_process_group("gloo")
    clean_stale_shared_memory()
    dataset = StreamingDataset(
        streams=[Stream(local=str(folder)) for folder in task.folders],
        shuffle=True,
        shuffle_seed=_SEED,
        batch_size=task.local_batch,
    )
    loader = StreamingDataLoader(dataset, batch_size=task.local_batch, num_workers=task.workers)
    if state is not None:
        loader.load_state_dict(state)
    for epoch in itertools.count(0 if state is None else state["epoch"]):
        for batch in loader:
            yield epoch, batch["id"].tolist(), loader.state_dict


def write_mds(task: Task) -> None:
    from streaming import MDSWriter

    bytes_of_shard = task.samples // NUM_SHARDS * 16  # 8 of the id, 4 of its offset, a header
    for number, folder in enumerate(task.folders):
        writer = MDSWriter(out=str(folder), columns={"id": "int"}, size_limit=bytes_of_shard)
        with writer:
            for one in task.ids(number):
                writer.write({"id": one})


def grain(task: Task, state: Any) -> Loop:
    from grain import MapDataset, MultiprocessingOptions
    from grain.experimental import ElasticIterator
    from grain.sharding import ShardOptions

    sets = [
        MapDataset.source(task.ids(number)).seed(_SEED + number).shuffle().repeat()
        for number in range(task.num_sets)
    ]
    iterator = iter(
        ElasticIterator(
            sets[0] if len(sets) == 1 else MapDataset.mix(sets),
            task.batch_size,
            ShardOptions(task.rank, task.world_size),
            multiprocessing_options=MultiprocessingOptions(num_workers=task.workers),
        )
    )
    if state is not None:
        iterator.set_state(state)
    for batch in iterator:
        drawn = iterator.get_state()["global_next_index"] - task.batch_size
        yield drawn // task.epoch_size, batch.tolist(), iterator.get_state


def webdataset(task: Task, state: Any) -> Loop:
    import torch
    from webdataset import FluidWrapper, RandomMix, WebDataset, WebLoader, split_by_node
    from webdataset.filters import detshuffle

    for epoch in itertools.count(state or 0):
        torch.manual_seed(_SEED + epoch)  # of the workers' seeds
        sets = [
            WebDataset(
                sorted(map(str, folder.glob("*.tar"))),
                shardshuffle=NUM_SHARDS,
                detshuffle=True,
                nodesplitter=split_by_node,
                seed=_SEED + epoch,
            )
            .compose(detshuffle(_BUFFER, seed=_SEED + epoch))
            .to_tuple("id")
            for folder in task.folders
        ]
        dataset = sets[0] if len(sets) == 1 else FluidWrapper(RandomMix(sets, longest=True))
        batches = dataset.batched(task.local_batch)
        loader = WebLoader(batches, batch_size=None, num_workers=task.workers)
        for number, (ids,) in enumerate(loader, 1):
            begin = epoch + number // (task.epoch_size // task.batch_size)  # the next if it is over
            yield epoch, list(map(int, ids)), functools.partial(int, begin)


def write_tars(task: Task) -> None:
    from webdataset import ShardWriter

    for number, folder in enumerate(task.folders):
        folder.mkdir(parents=True)
        size = task.samples // NUM_SHARDS
        with ShardWriter(f"{folder}/%02d.tar", maxcount=size, verbose=0) as writer:
            for one in task.ids(number):
                writer.write({"__key__": str(one), "id": str(one).encode()})


def datasets(task: Task, state: Any, *, buffer_size: int = 1, shards: int = 1) -> Loop:
    from datasets import interleave_datasets, load_dataset
    from datasets.distributed import split_dataset_by_node
    from torchdata.stateful_dataloader import StatefulDataLoader

    sets = [
        load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)
        for folder in task.folders
    ]
    strategy = "all_exhausted_without_replacement"
    mix = sets[0] if len(sets) == 1 else interleave_datasets(sets, stopping_strategy=strategy)
    shuffled = mix.shuffle(_SEED, buffer_size=buffer_size, max_buffer_input_shards=shards)
    dataset = split_dataset_by_node(shuffled, rank=task.rank, world_size=task.world_size)
    loader = StatefulDataLoader(dataset, batch_size=task.local_batch, num_workers=task.workers)
    if state is not None:
        loader.load_state_dict(state["loader"])
    for epoch in itertools.count(0 if state is None else state["epoch"]):
        dataset.set_epoch(epoch)
        for batch in loader:
            yield epoch, batch["id"].tolist(), functools.partial(_with_epoch, loader, epoch)


datasets_buffer = functools.partial(datasets, buffer_size=_BUFFER)
datasets_shuffle = functools.partial(datasets, buffer_size=1000, shards=10)  # its defaults


def _with_epoch(loader: Any, epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "loader": loader.state_dict()}


def write_parquet(task: Task) -> None:
    from datasets import Dataset

    for number, folder in enumerate(task.folders):
        folder.mkdir(parents=True)
        whole = Dataset.from_dict({"id": list(task.ids(number))})
        for shard in range(NUM_SHARDS):
            part = whole.shard(NUM_SHARDS, shard, contiguous=True)
            part.to_parquet(folder / f"{shard}.parquet")


def torchdata(task: Task, state: Any) -> Loop:
    loader, sampler = (_stateful_loader if task.num_sets == 1 else _nodes)(task)
    if state is not None:
        loader.load_state_dict(state["loader"])
    for epoch in itertools.count(0 if state is None else state["epoch"]):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for batch in loader:
            yield epoch, list(map(int, batch)), functools.partial(_with_epoch, loader, epoch)


def _stateful_loader(task: Task) -> tuple[Any, Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    records: Any = task.ids(0)
    sampler = StatefulDistributedSampler(records, task.world_size, task.rank, seed=_SEED)
    sizes = {"batch_size": task.local_batch, "num_workers": task.workers}
    return StatefulDataLoader(records, sampler=sampler, **sizes), sampler


def _nodes(task: Task) -> tuple[Any, None]:
    """Samplers of torch, whose epoch nodes restore; of torchdata's stateful one they do not."""
    from torch.utils.data.distributed import DistributedSampler
    from torchdata import nodes
    from torchdata.nodes import StopCriteria

    sources = {}
    for number in range(task.num_sets):
        records: Any = task.ids(number)
        sampler: Any = DistributedSampler(records, task.world_size, task.rank, seed=_SEED)
        drawn = nodes.SamplerWrapper(sampler)
        sources[str(number)] = nodes.ParallelMapper(
            drawn, records.__getitem__, num_workers=task.workers, method="process"
        )
    mix = nodes.MultiNodeWeightedSampler(
        sources,
        dict.fromkeys(sources, 1.0),
        stop_criteria=StopCriteria.ALL_DATASETS_EXHAUSTED,
        rank=task.rank,
        world_size=task.world_size,
        seed=_SEED,
    )
    batches = nodes.Batcher(mix, batch_size=task.local_batch)
    # a state at the end of an epoch ends it, and does not begin another one
    return nodes.Loader(batches, restart_on_stop_iteration=False), None
