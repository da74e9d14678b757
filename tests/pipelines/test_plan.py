"""The plan is a pure function of seed and step, whatever the number of ranks."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_tests import examples

from unicl_fast.augmentation import parse_augmentation
from unicl_fast.config import DataConfig
from unicl_fast.dataset.arrays import SAMPLE_DTYPE
from unicl_fast.dataset.block_cache import DEFAULT_BLOCK_BYTES
from unicl_fast.dataset.weights import WeightedDraws
from unicl_fast.pipelines.plan.plan import (
    PlannedBatch,
    PlanSource,
    TrainPlan,
    schedule_draws,
    split_steps,
    split_windows,
)
from unicl_fast.stages import lay_out

NUM_CLASSES = 10
EVERYTHING = "unicl,crop_scale=0.2..1,policy_probability=1,hue=0.1,grayscale=0.2,erase=0.5"


def make_source(
    size: int, *, captions: int = 0, labels: int = 0, name: str = "data", num_templates: int = 5
) -> PlanSource:
    samples = np.zeros(size, dtype=SAMPLE_DTYPE)
    samples["height"] = 100 + np.arange(size) % 50
    samples["width"] = 120
    samples["captions_count"] = captions
    samples["labels_count"] = labels
    samples["labels_start"] = labels * np.arange(size)
    return PlanSource(
        name=name,
        samples=samples,
        labels=(np.arange(size * labels) % NUM_CLASSES).astype(np.int32),
        num_templates=num_templates,
    )


def make_plan(*sources: PlanSource, batch: int = 8, seed: int = 0, **options: Any) -> TrainPlan:
    weights = options.pop("weights", None)
    augment = options.pop("augment", "none")
    beside = {name: options.pop(name) for name in ("spans", "stage") if name in options}
    return TrainPlan(
        sources,
        data=DataConfig(**options),
        global_batch_size=batch,
        seed=seed,
        weights=weights,
        augmentations=[parse_augmentation(augment)] * len(sources),
        **beside,
    )


def arrays(batch: PlannedBatch) -> dict[str, np.ndarray]:
    return {
        field.name: getattr(batch, field.name)
        for field in dataclasses.fields(batch)
        if field.name != "step"
    }


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@given(
    step=st.integers(0, 2**40),
    count=st.integers(1, 5),
    rank=st.integers(0, 2),
    text=st.sampled_from(["any", "captions", "labels"]),
)
def test_steps_planned_together_are_planned_as_each_alone(step, count, rank, text):
    plan = make_plan(
        make_source(40, labels=2, captions=1), make_source(25, captions=3),
        batch=12, text=text,
    )  # fmt: skip
    long = plan.long_batch(step, count, rank=rank, world_size=3)
    batches = split_steps(long, count, global_batch_size=12)
    assert [batch.step for batch in batches] == list(range(step, step + count))
    for batch in batches:
        alone = arrays(plan.batch(batch.step, rank=rank, world_size=3))
        found = arrays(batch)
        assert found.keys() == alone.keys()
        assert all(np.array_equal(found[name], alone[name]) for name in alone)


@given(
    sizes=st.lists(st.integers(24, 200), min_size=1, max_size=3),
    batch=st.integers(1, 24),
    step=st.integers(0, 2**40),
    seed=st.integers(-(2**63), 2**63),
    window=st.sampled_from([0, 16, 60, 1000]),
    data=st.data(),
)
def test_slices_of_any_number_of_ranks_join_to_the_same_global_batch(
    sizes, batch, step, seed, window, data
):
    world_size = data.draw(st.sampled_from(divisors(batch)))
    plan = make_plan(
        *(make_source(size, captions=2, labels=2) for size in sizes),
        batch=batch,
        seed=seed,
        augment=EVERYTHING,
        shuffle_window=window,
    )
    whole = arrays(plan.batch(step, rank=0, world_size=1))
    slices = [arrays(plan.batch(step, rank=r, world_size=world_size)) for r in range(world_size)]
    for name, expected in whole.items():
        assert np.array_equal(np.concatenate([s[name] for s in slices]), expected), name
    assert np.array_equal(whole["global_index"], np.arange(batch))


@given(size=st.integers(1, 300), seed=st.integers(0, 1000), data=st.data())
def test_an_epoch_shows_each_sample_once_from_any_start(size, seed, data):
    batch = data.draw(st.integers(1, size))
    world_size = data.draw(st.sampled_from(divisors(batch)))
    first_pass = data.draw(st.integers(0, 10**6))
    plan = make_plan(make_source(size, labels=1), batch=batch, seed=seed)
    start, end = first_pass * size, (first_pass + 1) * size
    steps = range(start // batch, -(-end // batch))
    ranks = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    seen = np.concatenate([plan.batch(step, **one).sample_ids for step in steps for one in ranks])
    seen = seen[start - steps[0] * batch :][:size]
    assert np.array_equal(np.sort(seen), np.arange(size))


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("size", [100, 90])
def test_each_source_makes_passes_of_its_own(window, size):
    """Together, if weights are their sizes, as without weights."""
    plan = make_plan(
        *(make_source(30, captions=1), make_source(size, labels=1)),
        weights=[0.25, 0.75] if size == 100 else None,
        batch=40,
        shuffle_window=window,
    )
    batches = [plan.batch(step, rank=0, world_size=1) for step in range(12)]
    source_ids = np.concatenate([b.source_ids for b in batches])
    sample_ids = np.concatenate([b.sample_ids for b in batches])
    assert np.bincount(source_ids).tolist() == [120, 360]
    for source, own in ((0, 30), (1, size)):
        draws = sample_ids[source_ids == source]
        passes = draws[: len(draws) // own * own].reshape(-1, own)
        assert np.array_equal(np.sort(passes, axis=1), np.tile(np.arange(own), (len(passes), 1)))
        assert not np.array_equal(passes[0], passes[1])


NUM_SAMPLES, NUM_DRAWS = 10_000_000, 2_000_000


def blocks_read(machine: int, machines: int, *, window: int, num_groups: int) -> int:
    """Simulates the cache of one machine: blocks that it fetches in the first draws of a run.

    Samples have 30 kB, shards 1 GB, blocks and cache are as in the settings, and global batches
    have 32,768 samples.
    """
    data, batch, sample_bytes = DataConfig(), 32_768, 30 << 10
    per_shard = (1 << 30) // sample_bytes
    blocks_of_shard = -(-(1 << 30) // DEFAULT_BLOCK_BYTES)
    fetched, cache = 0, data.cache_bytes // DEFAULT_BLOCK_BYTES
    # by step; -1 is not in the cache
    last_use = np.full(-(-NUM_SAMPLES // per_shard) * blocks_of_shard, -1)
    for step in range(NUM_DRAWS // batch):
        start, end = (step * batch + i * batch // machines for i in (machine, machine + 1))
        draws = np.arange(start, end)
        _, samples = schedule_draws(
            draws, sizes=[NUM_SAMPLES], seed=0, weights=(1,), global_batch_size=batch,
            shuffle_window=window, shuffle_groups=num_groups,
        )  # fmt: skip
        shards, places = np.divmod(samples, per_shard)
        ends = places[:, None] * sample_bytes + [0, sample_bytes - 1]
        blocks = np.unique(shards[:, None] * blocks_of_shard + ends // DEFAULT_BLOCK_BYTES)
        fetched += np.count_nonzero(last_use[blocks] < 0)
        last_use[blocks] = step
        kept = np.flatnonzero(last_use >= 0)
        if len(kept) > cache:
            oldest = kept[np.argsort(last_use[kept], kind="stable")]
            last_use[oldest[: len(kept) - int(0.8 * cache)]] = -1
    return fetched


@pytest.mark.parametrize(
    ("machines", "looked_at", "window", "num_groups", "least", "most"),
    [
        (8, [5], 250_000, 128, 1, 1.1),
        (8, [5], 250_000, 1, 7.5, 8.5),
        (128, [0, 77], 250_000, 128, 1, 1.2),
        (128, [0, 77], 250_000, 1, 80, 90),
        (100, [10, 50, 90], 1_000_000, 128, 1.6, 1.9),
    ],
)
def test_machines_together_read_a_remote_data_set_little_more_than_once(
    machines, looked_at, window, num_groups, least, most
):
    options = {"window": window, "num_groups": num_groups}
    fetched = [blocks_read(one, machines, **options) for one in looked_at]
    needed = NUM_DRAWS * (30 << 10) / DEFAULT_BLOCK_BYTES
    ratio = sum(fetched) / len(fetched) * machines / needed
    assert least <= ratio <= most


def test_seeds_change_everything_drawn():
    source = make_source(500, captions=5, labels=3)
    plans = [make_plan(source, batch=200, seed=seed, augment=EVERYTHING) for seed in (0, 1)]
    one, other = (all_of(plan, 1) for plan in plans)
    for name in set(one) - {"global_index", "source_ids"}:
        assert not np.array_equal(one[name], other[name]), name


def test_augmentation_leaves_everything_else_alone():
    source = make_source(300, captions=5, labels=3)
    options = {"batch": 200, "crop_scale": (0.2, 1.0)}
    plans = [make_plan(source, augment=augment, **options) for augment in ("none", EVERYTHING)]
    plain, full = (arrays(plan.batch(2, rank=0, world_size=1)) for plan in plans)
    for name in set(plain) - {"augment_rows"}:
        assert np.array_equal(plain[name], full[name]), name
    assert plain["augment_rows"].size == 0


def test_each_source_has_its_own_crops_flips_and_augmentation():
    sources = [make_source(600, labels=1), make_source(600, labels=1)]
    augmentations = [parse_augmentation("clip"), parse_augmentation("unicl,flip=1")]
    options = {"global_batch_size": 400, "seed": 0, "augmentations": augmentations}
    plan = TrainPlan(sources, data=DataConfig(), **options)
    batch = plan.batch(0, rank=0, world_size=1)
    mild, strong = (batch.source_ids == number for number in (0, 1))
    _, shapes, flips = split_windows(batch.windows)
    area = shapes.prod(axis=1)
    assert area[mild].min() > 0.85 * 100 * 120
    assert np.median(area[strong]) < 0.7 * 100 * 120
    assert not flips[mild].any()
    assert flips[strong].all()
    assert (batch.augment_rows[mild] == batch.augment_rows[mild][:1]).all()
    assert not batch.augment_rows[mild, 0].any()
    assert batch.augment_rows[strong, 0].all()


def test_a_draw_in_another_epoch_draws_anew():
    plan = make_plan(make_source(50, captions=5), batch=50)
    first, second = (plan.batch(step, rank=0, world_size=1) for step in (0, 1))
    one, other = np.argsort(first.sample_ids), np.argsort(second.sample_ids)
    assert not np.array_equal(first.windows[one, :4], second.windows[other, :4])
    assert not np.array_equal(first.captions[one], second.captions[other])
    assert not np.array_equal(first.windows[one, 4], second.windows[other, 4])


def all_of(plan: TrainPlan, steps: int) -> dict[str, np.ndarray]:
    batches = [arrays(plan.batch(step, rank=0, world_size=1)) for step in range(steps)]
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def test_any_text_is_a_fair_coin_between_kinds_then_uniform_within():
    drawn = all_of(make_plan(make_source(1000, captions=5, labels=2), batch=1000), 20)
    is_caption = drawn["captions"] >= 0
    assert abs(is_caption.mean() - 0.5) < 0.02
    assert np.array_equal(is_caption, drawn["labels"] < 0)
    assert np.array_equal(is_caption, drawn["templates"] < 0)
    counts = np.bincount(drawn["captions"][is_caption], minlength=5)
    assert abs(counts / counts.sum() - 0.2).max() < 0.02
    templates = np.bincount(drawn["templates"][~is_caption], minlength=5)
    assert abs(templates / templates.sum() - 0.2).max() < 0.02
    # sample i has labels 2 i and 2 i + 1 (mod 10), each equally often
    row = (drawn["labels"] - 2 * drawn["sample_ids"])[~is_caption] % NUM_CLASSES
    assert set(row.tolist()) == {0, 1}
    assert abs(row.mean() - 0.5) < 0.02


@pytest.mark.parametrize("text", ["any", "captions", "labels"])
def test_a_sample_shows_the_kind_of_text_that_it_has_or_that_was_asked_for(text):
    sources = make_source(100, captions=3), make_source(100, labels=2)
    drawn = all_of(make_plan(*sources, batch=50, text=text), 8)
    assert ((drawn["captions"] >= 0) == (drawn["source_ids"] == 0)).all()
    assert ((drawn["labels"] >= 0) == (drawn["source_ids"] == 1)).all()
    if text != "any":
        both = all_of(make_plan(make_source(100, captions=2, labels=2), batch=100, text=text), 3)
        assert (both[text] >= 0).all()


def test_flips_have_the_chance_that_was_asked_for():
    for chance in (0.0, 0.3, 1.0):
        plan = make_plan(make_source(5000, labels=1), batch=5000, flip_probability=chance)
        assert abs(plan.batch(0, rank=0, world_size=1).windows[:, 4].mean() - chance) < 0.03


def test_plans_that_cannot_be_are_refused():
    little, one = make_source(10, captions=1, name="little"), make_source(20, labels=1)
    sources = little, make_source(1000, labels=1)
    with pytest.raises(ValueError, match=r"little has 10 samples.*50\.0 of 100.*smaller"):
        make_plan(*sources, batch=100, weights=[1, 1])
    make_plan(*sources, batch=100, weights=[1, 9])
    little.samples["captions_count"][:3] = 0
    with pytest.raises(ValueError, match="3 of the 10 samples of little"):
        make_plan(little)
    with pytest.raises(ValueError, match="8 cannot be shared by 3 ranks"):
        make_plan(one).batch(0, rank=0, world_size=3)
    with pytest.raises(ValueError, match="2 weights were given for 1 data sets"):
        make_plan(one, weights=[1, 2])


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    step=st.integers(0, 2**40),
    seed=st.integers(-(2**63), 2**63),
    data=st.data(),
)
def test_substitutes_are_all_other_samples_of_the_source_each_once(sizes, step, seed, data):
    batch = data.draw(st.integers(1, min(sizes)))
    plan = make_plan(
        *(make_source(size, captions=2, labels=2) for size in sizes), batch=batch, seed=seed
    )
    planned = plan.batch(step, rank=0, world_size=1)
    row = data.draw(st.integers(0, batch - 1))
    source, scheduled = int(planned.source_ids[row]), int(planned.sample_ids[row])
    size = sizes[source]
    tried = []
    for attempt in range(1, max(2, 2 * size - 1)):
        substitute = plan.substitute(step, planned.global_index[[row]], attempt=attempt)
        assert substitute.global_index.tolist() == [row]
        assert substitute.source_ids.tolist() == [source]
        tried += substitute.sample_ids.tolist()
    if size == 1:  # there is no other
        assert tried == [scheduled]
        return
    assert sorted(tried[: size - 1]) == [i for i in range(size) if i != scheduled]
    assert tried[size - 1 :] == tried[: size - 1]


def test_a_substitute_depends_on_step_index_and_attempt_and_on_nothing_else():
    sources = make_source(3000, captions=3), make_source(2000, labels=2)
    plan = make_plan(*sources, batch=200, augment=EVERYTHING)
    global_index = np.arange(200)
    whole = arrays(plan.substitute(7, global_index, attempt=2))
    again = make_plan(*sources, batch=200, augment=EVERYTHING)
    for name, expected in whole.items():
        chosen = arrays(again.substitute(7, global_index[[150, 3]], attempt=2))[name]
        assert np.array_equal(chosen, expected[[150, 3]]), name
    for other in (
        plan.substitute(8, global_index, attempt=2),
        plan.substitute(7, global_index, attempt=3),
        make_plan(*sources, batch=200, seed=1, augment=EVERYTHING).substitute(
            7, global_index, attempt=2
        ),
    ):
        same = np.mean(whole["sample_ids"] == other.sample_ids)
        assert same < 0.02
        assert np.mean(whole["windows"][:, :2] == other.windows[:, :2]) < 0.2
        assert (whole["augment_rows"] != other.augment_rows).any(axis=1).all()
    assert len(np.unique(whole["sample_ids"])) > 180


@given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    steps=st.integers(1, 6),
    window=st.sampled_from([0, 16]),
)
@examples(25)
def test_a_stage_continues_the_order_where_the_one_before_ended(sizes, steps, window):
    """Whatever its batches, every draw is what it would be in batches of one."""
    sources = [make_source(40, labels=1), make_source(23, captions=2)]
    *others, own = sizes
    entries = tuple(f"{steps * size}:global_batch_size={size}" for size in others)
    spans = lay_out(entries, samples=steps * sum(sizes), global_batch_size=own)
    options = {"shuffle_window": window, "shuffle_groups": 1}
    shown: dict[str, list[np.ndarray]] = {}
    for span in spans:
        stage = {"spans": spans, "stage": span.number}
        plan = make_plan(*sources, batch=span.global_batch_size, **stage, **options)
        long = plan.long_batch(span.first_step, steps, rank=0, world_size=1)
        singly = [
            arrays(plan.batch(span.first_step + step, rank=rank, world_size=size))
            for size in divisors(span.global_batch_size)[:2]
            for step in range(steps)
            for rank in range(size)
        ]
        for name in ("source_ids", "sample_ids", "windows", "captions", "labels"):
            of_span = getattr(long, name)
            shown.setdefault(name, []).append(of_span)
            joined = np.concatenate([one[name] for one in singly])
            assert np.array_equal(
                joined, np.concatenate([of_span] * (len(joined) // len(long.labels)))
            )
    plain = make_plan(*sources, batch=1, **options)
    expected = plain.long_batch(0, steps * sum(sizes), rank=0, world_size=1)
    for name, parts in shown.items():
        assert np.array_equal(np.concatenate(parts), getattr(expected, name)), name
    assert plain.epochs(40 + 23) == [1, 1]
    assert plan.epochs(spans[-1].end_step) == plain.epochs(steps * sum(sizes))
    assert plan.epochs(1) == plain.epochs(sizes[0])


def test_what_is_planned_beyond_the_end_of_a_stage_is_replaced_from_its_own_source():
    """Batches are read ahead; one bad sample there would be looked for in the stage after."""
    sources = [make_source(1000, labels=1), make_source(40, captions=1)]
    spans = lay_out(("500:global_batch_size=20",), samples=1000, global_batch_size=10)
    plan = make_plan(*sources, batch=20, spans=spans, stage=0)
    assert spans[0].end_step == 25
    for planned in split_steps(
        plan.long_batch(24, 3, rank=0, world_size=1), 3, global_batch_size=20
    ):
        again = plan.batch(planned.step, rank=0, world_size=1)
        assert np.array_equal(again.sample_ids, planned.sample_ids)
        other = plan.substitute(planned.step, planned.global_index, attempt=1)
        assert np.array_equal(other.source_ids, planned.source_ids)


def test_texts_of_a_batch_are_prompts_of_one_level_which_changes_from_step_to_step():
    """A class that ends above the level stands for itself; ranks and long batches agree."""
    starts, chains = np.array([0, 3, 5, *range(6, 14)]), np.array([7, 2, 0, 7, 1, *range(2, 10)])
    plain = make_source(60, labels=1)
    source = dataclasses.replace(plain, labels=plain.labels % 3, chains=(starts, chains))
    plan = make_plan(source, batch=60, prompts="levels")
    own = make_plan(dataclasses.replace(source, chains=None), batch=60)
    at_level = [{0: 7, 1: 7, 2: 2}, {0: 2, 1: 1, 2: 2}, {0: 0, 1: 1, 2: 2}]
    long = plan.long_batch(4, 3, rank=0, world_size=1)
    together = split_steps(long, 3, global_batch_size=60)
    for step in range(7):
        whole = plan.batch(step, rank=0, world_size=1)
        labels = own.batch(step, rank=0, world_size=1).labels
        assert whole.labels.tolist() == [at_level[step % 3][label] for label in labels.tolist()]
        halves = [plan.batch(step, rank=rank, world_size=2).labels for rank in range(2)]
        assert np.array_equal(np.concatenate(halves), whole.labels)
        if step >= 4:
            assert np.array_equal(together[step - 4].labels, whole.labels)
    substitutes = plan.substitute(1, np.arange(60), attempt=1).labels
    assert set(substitutes.tolist()) == {2, 1}


@given(
    weights=st.lists(st.floats(2**-10, 2**10, width=32), min_size=1, max_size=60),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 10**6),
)
def test_each_epoch_draws_a_sample_as_often_as_its_share_rounded(weights, seed, first):
    values = np.array(weights, np.float32)
    share = values.astype(float) * len(values) / values.sum(dtype=float)
    draws = WeightedDraws(values, seed=seed, source=1)
    total = np.zeros(len(values))
    for epoch in range(first, first + 5):
        rows = draws.samples_of(np.arange(len(values)), epoch)
        assert np.array_equal(np.bincount(rows, minlength=len(values)), draws.counts(epoch))
        assert (np.abs(draws.counts(epoch) - share) < 1 + 1e-6).all()
        total += draws.counts(epoch)
    assert (np.abs(total - 5 * share) < 3).all()  # less than five roundings could add up to
    assert total.sum() == 5 * len(values)


@pytest.mark.parametrize("window", [0, 16])
def test_samples_are_drawn_by_weight(window):
    def schedule(*weights: float) -> tuple[np.ndarray, np.ndarray, TrainPlan]:
        one, other = make_source(40, captions=1), make_source(25, captions=1)
        one = dataclasses.replace(one, weights=np.resize(np.array(weights, np.float32), 40))
        plan = make_plan(one, other, batch=13, shuffle_window=window)
        found = (each.reshape(20, 13) for each in plan.schedule(0, 20, rank=0, world_size=1))
        return *found, plan

    plain, planned, _ = schedule(1)
    for weight in (3, 0.1):  # equal weights change no bit
        assert np.array_equal(schedule(weight)[1], planned)
    sources, samples, plan = schedule(1, 0.5, 6, 0.25)
    assert np.array_equal(sources, plain)
    assert np.array_equal(samples[sources == 1], planned[sources == 1])
    for epoch in samples[sources == 0].reshape(4, 40):
        counts = np.bincount(epoch, minlength=40)
        assert np.abs(counts - np.resize([1, 0.5, 6, 0.25], 40) / 7.75 * 4).max() < 1
    ranks = [plan.long_batch(3, 4, rank=rank, world_size=13).sample_ids for rank in range(13)]
    assert np.array_equal(np.stack(ranks, axis=1), samples[3:7])
