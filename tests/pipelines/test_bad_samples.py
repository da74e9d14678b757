"""Bad samples of a run are replaced, and nothing else changes."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import flip_byte, shard_of, store, undecodable
from loader_runs import (
    assert_equal,
    assert_joined,
    assert_same,
    config_of,
    count_replaced,
    remembering,
    rows_of,
    take,
)

from unicl_fast.config import DataConfig
from unicl_fast.dataset.quarantine import RunQuarantine
from unicl_fast.dataset.reader import (
    DamagedDatasetError,
    DamagedSampleError,
    PackedDataset,
    TooManyBadSamplesError,
)
from unicl_fast.images.limits import MAX_PIXELS
from unicl_fast.objectives.registry import make_objective
from unicl_fast.pipelines import running as graphs
from unicl_fast.pipelines.evaluation_loader import EvaluationLoader
from unicl_fast.pipelines.read.bad_samples import MAX_ATTEMPTS
from unicl_fast.pipelines.running import DecodingError
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.text.prompts import ClassPrompts

pytestmark = pytest.mark.dali

STEPS = 10  # more than a pass over both data sets
LABELLED, CAPTIONED = 0, 1


def make_loader(
    datasets: Sequence[PackedDataset],
    prompts: ClassPrompts,
    max_pixels: int = MAX_PIXELS,
    **more: Any,
) -> Any:
    config = config_of(max_pixels=max_pixels, augment=("unicl",))
    config = dataclasses.replace(config, objective=make_objective(positives="labels"))
    return TrainLoader(config, datasets, None, prompts, **more)


@pytest.fixture(autouse=True)
def two_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches are made ahead, as of large images: tests count them."""
    monkeypatch.setattr("unicl_fast.pipelines.running._SMALL_BATCH_BYTES", 0)


@pytest.fixture
def sound(labelled: PackedDataset, captioned: PackedDataset) -> list[PackedDataset]:
    return [labelled, captioned]


def planned_pairs(loader: TrainLoader, step: int) -> list[tuple[int, int]]:
    return pairs_of(loader.plan.batch(step, rank=0, world_size=1))


def pairs_of(planned: Any) -> list[tuple[int, int]]:
    return list(zip(planned.source_ids.tolist(), planned.sample_ids.tolist(), strict=True))


def test_images_beyond_the_limit_on_pixels_are_never_decoded(sound, prompts, tmp_path):
    assert DataConfig().max_pixels == MAX_PIXELS  # as packing's
    pixels = {
        (source, i): int(row["height"]) * int(row["width"])
        for source, dataset in enumerate(sound)
        for i, row in enumerate(dataset.samples)
    }
    limit = sorted(pixels.values())[-4]
    bad = {pair for pair, number in pixels.items() if number > limit}
    path = tmp_path / "quarantine.csv"
    batches = take(make_loader(sound, prompts, limit, quarantine=path), count=STEPS)
    assert count_replaced(batches, take(make_loader(sound, prompts), count=STEPS), bad) >= 1
    assert 1 <= len(rows_of(path)) <= len(bad)
    for row in rows_of(path):
        size = sound[LABELLED].samples[int(row["key"])]
        assert row["reason"] == (
            f"{size['width']} x {size['height']} pixels; at most {limit:,} are taken "
            "(data.max_pixels)"
        )
    data = config_of(max_pixels=limit).data
    with pytest.raises(DamagedSampleError, match=rf"sample \d+ .* pixels; at most {limit:,} are"):
        list(EvaluationLoader(sound[LABELLED], data, batch_size=5))


def test_the_substitute_is_the_plan_s_with_text_window_and_flip_of_its_own(
    sound, folders, spoilt, prompts, monkeypatch
):
    """Fed from sound data by a plan that has the substitutes in it: the same bits."""
    bad = {(LABELLED, 5), (LABELLED, 40), (CAPTIONED, 17), (CAPTIONED, 20)}
    for source, sample in sorted(bad):
        flip_byte(folders[source], sample)
    batches = take(make_loader(spoilt(), prompts), count=STEPS)
    loader = make_loader(sound, prompts)
    plan_of = loader.plan.long_batch
    monkeypatch.setattr("unicl_fast.pipelines.steps._PLANNED_AT_ONCE", 1)

    def with_substitutes(step: int, count: int, *, rank: int, world_size: int) -> Any:
        planned = plan_of(step, count, rank=rank, world_size=world_size)
        for row, pair in enumerate(pairs_of(planned)):
            if pair in bad:
                chosen = next(
                    one
                    for attempt in itertools.count(1)
                    if (pair[0], int((one := loader.plan.substitute(
                        step, planned.global_index[[row]], attempt=attempt)).sample_ids[0])) not
                        in bad
                )  # fmt: skip
                for field in dataclasses.fields(planned):
                    if field.name != "step":
                        getattr(planned, field.name)[row] = getattr(chosen, field.name)[0]
        return planned

    loader.plan.long_batch = with_substitutes
    for one, other in zip(batches, take(loader, count=STEPS), strict=True):
        assert_equal(dataclasses.replace(one, scheduled_ids=other.scheduled_ids), other)


def many_bad(loader: TrainLoader) -> dict[tuple[int, int], str]:
    """Of all kinds and both sources, several of one batch, and the first two substitutes of one."""
    first = planned_pairs(loader, 2)
    kinds = ("flip", "html", "gif", "wrong size", "cut png")
    bad = dict(zip(first[:5], kinds, strict=True))
    index = np.array([0], dtype=np.int64)
    for attempt, kind in ((1, "flip"), (2, "html")):
        substitute = loader.plan.substitute(2, index, attempt=attempt)
        bad[(first[0][0], int(substitute.sample_ids[0]))] = kind
    bad[planned_pairs(loader, 3)[7]] = "gif"
    bad[planned_pairs(loader, 7)[1]] = "html"
    return bad


def spoil(folders: Sequence[Path], bad: dict[tuple[int, int], str]) -> None:
    for (source, sample), kind in bad.items():
        if kind == "flip":
            flip_byte(folders[source], sample)
        elif kind == "wrong size":  # a sound image, smaller than the index says
            store(folders[source], sample, graphs._sound_image().tobytes())
        else:
            store(folders[source], sample, undecodable(kind))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bad_samples_of_all_kinds_and_bad_substitutes_are_replaced_and_nothing_else_changes(
    sound, folders, spoilt, prompts, device, tmp_path, caplog
):
    loader = make_loader(sound, prompts, device=device)
    expected = take(loader, count=STEPS)
    bad = many_bad(loader)
    assert len(bad) >= 8
    spoil(folders, bad)
    path, datasets = tmp_path / "quarantine.csv", spoilt()
    batches = take(make_loader(datasets, prompts, device=device, quarantine=path), count=STEPS)
    assert count_replaced(batches, expected, set(bad)) >= len(bad)
    assert caplog.text.count("BAD SAMPLE") == 5
    assert str(path) in caplog.text
    sources = {str(folder): source for source, folder in enumerate(folders)}
    for row in rows_of(path):
        source, sample = sources[row["data_set"]], int(row["key"])
        assert row["shard"] == datasets[source].shard_of(sample)
        assert int(row["offset"]) == datasets[source].samples[sample]["offset"]
        wanted = "checksum" if bad[source, sample] == "flip" else "the decoder refuses it"
        assert wanted in row["reason"]
        assert len(row["reason"]) < 300
    # known beforehand, they are replaced by the same, on data where nothing is wrong with them
    assert_same(
        batches,
        take(remembering(make_loader(sound, prompts, device=device), set(bad)), count=STEPS),
    )


def test_ranks_join_to_the_same_global_batches(sound, folders, spoilt, prompts):
    spoil(folders, many_bad(make_loader(sound, prompts)))
    datasets = spoilt()
    whole = take(make_loader(datasets, prompts), count=9)
    ranks = [
        take(make_loader(datasets, prompts, rank=rank, world_size=2), count=9) for rank in range(2)
    ]
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert_joined(parts, expected)


def test_a_shard_cut_or_deleted_while_it_is_read_is_replaced_sample_by_sample(
    sound, folders, spoilt, prompts
):
    expected = take(make_loader(sound, prompts), count=STEPS)
    datasets = spoilt()
    names = [datasets[LABELLED].shard_of(i) for i in range(len(sound[LABELLED]))]
    cut, gone = names[0], names[-1]
    assert cut != gone
    loader = make_loader(datasets, prompts)
    running = loader.batches(0)
    batches = [next(running)]
    os.truncate(folders[LABELLED] / cut, 700)  # some of its samples have been read, or are being
    datasets[LABELLED]._reader._files.clear()  # as if none had been opened yet
    (folders[LABELLED] / gone).unlink()
    batches += list(itertools.islice(running, STEPS - 1))
    loader.close()
    bad = {(LABELLED, i) for i, name in enumerate(names) if name in (cut, gone)}
    # by then up to four more batches had been prepared
    assert count_replaced(batches[5:], expected[5:], bad) > 3
    shown = [b.sample_ids == b.scheduled_ids for b in batches[:5]]
    for batch, whole, same in zip(batches, expected, shown, strict=False):
        assert torch.equal(batch.images[same], whole.images[same])


def test_arrays_cut_in_place_end_the_run_with_a_sentence(folders, spoilt, prompts):
    loader = make_loader(spoilt(), prompts)
    running = loader.batches(0)
    next(running)
    os.truncate(folders[CAPTIONED] / "tokens.npy", 200)
    with pytest.raises(DamagedDatasetError, match=r"tokens\.npy was cut from \d+ to 200 bytes"):
        list(itertools.islice(running, 10))
    loader.close()


def test_a_quarantine_file_lists_each_once_over_ranks_and_begins_anew_if_removed(tmp_path, caplog):
    path = tmp_path / "run" / "quarantine.csv"
    lists = RunQuarantine(path), RunQuarantine(path)
    assert not path.exists()
    for key in ("one", "two", "two", "one"):
        for one in (*lists, RunQuarantine(path)):  # the last one after a restart
            one.add("photos", "shard-000000.tar", key, 0, "it is\ndamaged")
    rows = rows_of(path)
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("one", "it is damaged"), ("two", "it is damaged"),
    ]  # fmt: skip
    path.unlink()
    lists[0].add("photos", "shard-000000.tar", "three", 0, "it is damaged")
    assert [row["key"] for row in rows_of(path)] == ["three"]
    assert caplog.text.count(f"{path} was removed or cut") == 1


def test_when_nothing_is_good_the_run_ends_and_says_where_to_look(
    folders, spoilt, prompts, tmp_path
):
    datasets = spoilt()
    for shard in folders[LABELLED].glob("*.tar"):
        shard.unlink()
    loader = make_loader(datasets, prompts, quarantine=tmp_path / "quarantine.csv")
    with pytest.raises(
        TooManyBadSamplesError, match=rf"step 0: .*{MAX_ATTEMPTS} others.*quarantine\.csv"
    ):
        next(loader.batches(0))
    loader.close()


def test_a_decoder_that_fails_at_everything_condemns_nothing(
    folders, spoilt, prompts, tmp_path, monkeypatch
):
    store(folders[CAPTIONED], 17, undecodable("html"))
    no_image = np.frombuffer(b"as if the device were gone", dtype=np.uint8)
    monkeypatch.setattr(graphs, "_sound_image", lambda: no_image)
    loader = make_loader(spoilt(), prompts, quarantine=tmp_path / "quarantine.csv")
    with pytest.raises(DecodingError):
        list(itertools.islice(loader.batches(0), STEPS))
    loader.close()
    assert not (tmp_path / "quarantine.csv").exists()


def test_a_batch_that_fails_though_its_images_do_not_is_named_by_its_step(
    folders, spoilt, prompts, monkeypatch
):
    store(folders[CAPTIONED], 17, undecodable("html"))
    loader = make_loader(spoilt(), prompts)
    step = next(s for s in itertools.count() if (CAPTIONED, 17) in planned_pairs(loader, s))
    monkeypatch.setattr("unicl_fast.pipelines.train_loader.find_undecodable", lambda *_, **__: {})
    with pytest.raises(DecodingError, match=rf"step {step}, rank 0: .*alone: nvImageCodec"):
        list(itertools.islice(loader.batches(0), STEPS))
    loader.close()


def test_evaluation_names_what_it_cannot_show_and_replaces_nothing(folders, spoilt):
    data = config_of().data
    store(folders[CAPTIONED], 47, undecodable("html"))
    store(folders[CAPTIONED], 45, undecodable("gif"))
    dataset = spoilt()[CAPTIONED]
    loader = EvaluationLoader(dataset, data, batch_size=5)
    batches = iter(loader)
    assert sum(len(next(batches).sample_ids) for _ in range(9)) == 45
    with pytest.raises(DecodingError, match=r"sample 0000000045.*sample 0000000047") as caught:
        next(batches)
    assert str(caught.value).count("sample 0") == 2
    flip_byte(folders[CAPTIONED], 3)
    with pytest.raises(DamagedSampleError, match="sample 0000000003 .*checksum"):
        list(loader)
    shard_of(folders[CAPTIONED], 3).unlink()
    with (
        PackedDataset(folders[CAPTIONED], max_bad_fraction=1.0) as opened_later,
        pytest.raises(DamagedSampleError, match="sample 0000000000 .*cannot be read.*No such file"),
    ):
        list(EvaluationLoader(opened_later, data, batch_size=5))
