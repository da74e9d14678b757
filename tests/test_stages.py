"""Stages of a run: settings, steps and samples as functions of `run.stages`."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unicl_fast.config import DataConfig, EfficiencyConfig, OptimConfig, RunConfig, TrainConfig
from unicl_fast.config_json import config_from_dict, config_to_dict
from unicl_fast.objectives.registry import make_objective
from unicl_fast.stages import lay_out, span_at

LOW = "0.8:image_size=32,crop_scale=0.4..1,global_batch_size=100,context_length=40"


def config_of(*stages: str, samples: int = 10_000, **groups: object) -> TrainConfig:
    run = RunConfig(samples=samples, global_batch_size=512, stages=stages)
    return TrainConfig(run=run, **({"data": DataConfig(image_size=64)} | groups))


def test_a_stage_replaces_settings_and_the_last_one_has_the_runs_own():
    config = config_of(LOW, "1000:image_size=48,context_length=32,micro_batch_size=8")
    low, middle, last = config.stages
    assert (low.config.data.image_size, low.config.data.crop_scale) == (32, (0.4, 1.0))
    assert (low.config.run.global_batch_size, low.config.model.context_length) == (100, 40)
    assert middle.config.model.context_length == 32
    assert middle.config.efficiency.micro_batch_size == 8
    assert middle.config.run.global_batch_size == 512
    own = config.changed(run={"stages": ()})
    assert last.config == own
    # 8000 samples, then the whole step that is nearest to 9000, then what is left
    assert [one.span.first_step for one in config.stages] == [0, 80, 82]
    assert [config.run.draws_before(step) for step in (0, 79, 80, 81, 82)] == [
        0, 7900, 8000, 8512, 9024,
    ]  # fmt: skip
    assert config.run.total_steps == 84


def test_a_run_without_stages_is_one():
    config = config_of()
    (only,) = config.stages
    assert only.config is config
    assert (only.span.first_step, only.span.end_step) == (0, config.run.total_steps) == (0, 20)
    assert RunConfig().total_steps == 0
    assert RunConfig(global_batch_size=3).draws_before(5) == 15


def test_stages_go_to_json_and_back():
    config = config_of(LOW)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@given(
    entries=st.lists(
        st.tuples(
            st.one_of(st.floats(0.01, 0.3), st.integers(1, 10**6)), st.none() | st.integers(1, 999)
        ),
        max_size=3,
    ),
    samples=st.integers(1, 10**8),
    size=st.integers(1, 5000),
)
def test_spans_follow_each_other_in_steps_and_draws(entries, samples, size):
    texts = tuple(
        f"{length}:" + (f"global_batch_size={batch}" if batch else "image_size=8")
        for length, batch in entries
    )
    try:
        spans = lay_out(texts, samples=samples, global_batch_size=size)
    except ValueError as error:
        assert "needs some" in str(error)  # noqa: PT017
        return
    assert [span.number for span in spans] == list(range(len(entries) + 1))
    step = draw = 0
    planned = 0.0
    for span, (length, batch) in zip(spans, [*entries, (0, None)], strict=True):
        assert (span.first_step, span.first_draw) == (step, draw)
        assert span.global_batch_size == (batch or size)
        assert span.end_step > step
        assert span_at(spans, step) is span is span_at(spans, span.end_step - 1)
        draw = span.draws_before(span.end_step)
        step = span.end_step
        planned += length * samples if length < 1 else length
        has_one_step = span.end_step == span.first_step + 1  # each has at least one
        off = abs(draw - planned)
        assert span is spans[-1] or has_one_step or off <= span.global_batch_size
    assert span_at(spans, step + 7) is spans[-1]
    assert 0 <= draw - samples < size


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("image_size=32", "must begin with the stage's part of the run"),
        ("1.5:image_size=32", "must begin with the stage's part of the run"),
        ("nan:image_size=32", "must begin with the stage's part of the run"),
        ("0.8:", "expected NAME=VALUE"),
        ("0.8:lr=1", "one of image_size, crop_scale"),
        ("0.8:image_size=32,image_size=48", "each NAME once"),
        ("0.8:image_size=0", "image_size must be a whole number of at least 1, not '0'"),
        ("0.8:global_batch_size=x", "global_batch_size must be a whole number"),
        ("0.8:crop_scale=0.4", r"crop_scale must be a range LOW\.\.HIGH"),
        ("0.8:crop_scale=0.9..0.1", "data.crop_scale must not fall"),
        ("0.8:image_size=65", "image_size must not be larger than the run's own, 64"),
        ("0.8:context_length=78", "context_length must not be larger than the run's own, 77"),
        ("10000:image_size=32", "takes 10,240 of the run's 10,000 samples, and the last stage"),
    ],
)
def test_wrong_stages_are_refused(stage, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_of(stage)
    assert "run.stages" in str(caught.value)


def test_what_stages_cannot_go_with_is_refused():
    with pytest.raises(ValueError, match="run.steps does not say how many samples"):
        RunConfig(steps=10, stages=("0.5:global_batch_size=8",))
    assert RunConfig(steps=10, stages=("0.5:image_size=8",)).total_steps == 10
    windows = DataConfig(image_size=64, shuffle_window=100)
    with pytest.raises(ValueError, match="need data.shuffle_groups=1"):
        config_of(LOW, data=windows)
    config_of(LOW, data=dataclasses.replace(windows, shuffle_groups=1))
    with pytest.raises(ValueError, match="context_length is for objectives with texts"):
        config_of("0.5:context_length=8", objective=make_objective("ce"))
    with pytest.raises(ValueError, match="the same in every step"):
        config_of(
            "0.8:image_size=32",
            data=DataConfig(
                image_size=64, crop_scale=(1, 1), crop_ratio=(1, 1), flip_probability=0
            ),
            efficiency=EfficiencyConfig(stored_features="features"),
            optim=OptimConfig(freeze=("image",)),
        )
