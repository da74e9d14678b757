"""Settings: their ranges, their JSON, and the sentences that refuse them."""

import dataclasses
import json
import math

import pytest
from small_runs import tiny_config

from unicl_fast.config import (
    DataConfig,
    EfficiencyConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from unicl_fast.config_json import (
    REMOVED,
    config_from_dict,
    config_to_dict,
    load_config,
    settled_values,
    with_settled,
)
from unicl_fast.objectives.registry import OBJECTIVES, make_objective, objective_class
from unicl_fast.tools.pretrain import parse_arguments

CONFIG = config_to_dict(tiny_config())


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("data", "image_size", "32"),
        ("data", "image_size", True),
        ("data", "image_size", None),
        ("data", "train", "packed"),
        ("data", "train", [1]),
        ("data", "crop_scale", [0.1]),
        ("data", "crop_scale", {"low": 0.1}),
        ("data", "interpolation", ["bilinear"]),
        ("model", "text_heads", 0),
        ("objective", "name", "softmax"),
        ("objective", "logit_scale_init", float("inf")),
        ("objective", "logit_scale_max", float("nan")),
        ("optim", "lr", float("nan")),
        ("optim", "lr", 10**400),
        ("optim", "lr", float("inf")),
        ("optim", "weight_decay", float("inf")),
        ("optim", "clip_norm", float("inf")),
        ("data", "std", [0.2, 0.2, float("inf")]),
        ("data", "crop_ratio", [1.0, float("inf")]),
        ("optim", "betas", [0.9, "x"]),
        ("run", "seed", 2**64),
        ("run", "samples", 1.5),
    ],
)
def test_settings_of_another_type_are_refused_by_name(group, name, value):
    values = json.loads(json.dumps(CONFIG))
    values[group][name] = value
    with pytest.raises(ValueError, match=f"^config: {group}.{name} must"):
        config_from_dict(values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DataConfig(image_size=0),
            "data.image_size must be a whole number in 1 to 8192, not 0",
        ),
        (lambda: DataConfig(threads=-1), "data.threads must be a whole number of at least 0"),
        (
            lambda: DataConfig(fraction=(0.0,)),
            "data.fraction must be a list, each a number in (0, 1], not (0.0,)",
        ),
        (
            lambda: DataConfig(std=(1.0, 1.0, 0.0)),
            "data.std must be 3 values, each a number in (0, inf), not (1.0, 1.0, 0.0)",
        ),
        (lambda: DataConfig(crop_ratio=(2.0, 1.0)), "data.crop_ratio must not fall, as 2 to 1"),
        (lambda: DataConfig(image_size=300), "data.evaluation_resize (256) must not be"),
        (lambda: DataConfig(train=("a", "b", "c"), fraction=(1.0, 0.5)), "one for each of the 3"),
        (lambda: ModelConfig(drop_path=1), "model.drop_path must be a number in [0, 1), not 1"),
        (lambda: ModelConfig(text_pool="bert:max"), "model.text_pool takes end, last, or bert"),
        (lambda: ModelConfig(text_heads=7), "model.text_heads (7) must divide"),
        (
            lambda: make_objective(logit_scale_init=math.inf),
            "objective.logit_scale_init must be a number that is finite, not inf",
        ),
        (lambda: OptimConfig(clip_norm=math.inf), "optim.clip_norm must be a number in [0, inf)"),
        (lambda: ModelConfig(drop_path=-0.1), "model.drop_path must be a number in [0, 1)"),
        (lambda: DataConfig(fraction=(1.1,)), "data.fraction must be a list, each a number in"),
        (lambda: DataConfig(train=("a",), fraction=()), "data.fraction takes one number"),
        (lambda: OptimConfig(lr_min=1.0), "optim.lr_min (1.0) must not be larger than optim.lr"),
        (
            lambda: EfficiencyConfig(activation_checkpointing=1),
            "efficiency.activation_checkpointing must be true or false, not 1",
        ),
        (lambda: RunConfig(device="tpu"), "run.device must be one of auto, cpu, cuda, not 'tpu'"),
        (
            lambda: EfficiencyConfig(compile="encoders"),
            "efficiency.compile must be one of auto, off, blocks, not 'encoders'",
        ),
        (lambda: RunConfig(trackers=("trackio",)), "each one of tensorboard, wandb, mlflow, not"),
        (lambda: DataConfig(augment=("x" * 10_001,)), "has a text of 10,001 characters, and at"),
        (lambda: RunConfig(seed=0.5), "run.seed must be a whole number, not 0.5"),
    ],
)
def test_a_refusal_names_the_field_what_it_takes_and_what_came(make, message):
    with pytest.raises(ValueError) as refused:
        make()
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "config") for text in (b"\xff\xfe", b"[" * 100_000, b"", b"{", b"[]")),
        (b'{"run": 3}', "config: run must be an object, not 3"),
        (b'{"run": {"seed": 1, "seed": 2}}', "a name stands twice among .*seed"),
    ],
)
def test_files_that_are_no_config_say_so(tmp_path, text, message):
    """Unknown names are looked for in programs/test_run_settings.py."""
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "config.json")


def test_configs_survive_json(tmp_path):
    free = config_to_dict(TrainConfig())
    free["objective"]["logit_scale_max"] = math.inf
    every = [config_to_dict(TrainConfig(objective=make_objective(name))) for name in OBJECTIVES]
    for values in (*every, CONFIG, free):
        text = json.dumps(values)
        assert config_to_dict(config_from_dict(json.loads(text))) == values
        (tmp_path / "config.json").write_text(text)
        assert load_config(tmp_path / "config.json") == config_from_dict(values)


def test_what_is_settled_for_ce_is_kept_as_differences_without_threads():
    given = TrainConfig(objective=make_objective("ce"))
    settled = dataclasses.replace(
        given,
        objective=given.objective.settle((2, 3), num_several=0),
        efficiency=dataclasses.replace(given.efficiency, precision="bf16"),
    )
    on_rank = settled.changed(data={"threads": 7})
    changes = settled_values(config_to_dict(given), on_rank)
    assert changes == {
        "objective": {"positives": "text", "num_classes": (2, 3)},
        "efficiency": {"precision": "bf16"},
    }
    stored = json.loads(json.dumps([config_to_dict(given), changes]))
    assert with_settled(*stored) == settled
    assert settled_values(config_to_dict(given), given) == {}
    for wrong in ([], {"objective": 3}):
        with pytest.raises(ValueError, match="settled must hold groups of settings, not"):
            with_settled(stored[0], wrong)
    with pytest.raises(ValueError, match="efficiency.speed is not a field"):
        with_settled(stored[0], {"efficiency": {"speed": 3}})


def test_settings_that_a_file_lacks_take_their_defaults():
    assert config_from_dict({"run": {"seed": 3}}) == TrainConfig(run=RunConfig(seed=3))


def test_removed_options_are_read_at_their_default_and_refused_at_others():
    values = json.loads(json.dumps(CONFIG))
    old = {group: values[group] | names for group, names in REMOVED.items()}
    assert config_from_dict(values | old) == config_from_dict(values)
    for group, names in REMOVED.items():
        for name in names:
            said = f"^config: {group}.{name}=0.5 is not a field of this version, which no longer"
            with pytest.raises(ValueError, match=f"{said} .*the version that wrote it$"):
                config_from_dict({group: {name: 0.5}})


def test_a_run_loads_by_choices_that_have_left_and_changed_no_result():
    old = {"efficiency": {"compile": "encoders"}, "run": {"trackers": ["trackio", "wandb"]}}
    loaded = config_from_dict(old)
    assert (loaded.efficiency.compile, loaded.run.trackers) == ("auto", ("wandb",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": {"name": "supcon", "temperature": 0.5}, "data": {"augment": ["supcon"]}},
            "objective.name=supcon has left, .*: choose one of unicl, .*",
        ),
        ({"data": {"augment": ["supcon"]}}, "'supcon': supcon has left: without"),
        ({"data": {"augment": ["a:unicl,views=2"]}}, "'unicl,views=2': views=2 has left: leave"),
        ({"data": {"augment": ["none,blur=0.5"]}}, "'none,blur=0.5': blur=0.5 has left: leave"),
    ],
)
def test_a_config_of_two_views_or_a_blur_is_refused_in_a_sentence(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"^{path}: config: .*{message}.*Resume or") as refusal:
        load_config(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["init", "init_image", "init_text"])
def test_initial_weights_have_a_short_option(name, monkeypatch):
    nothing: dict[str, dict] = {"model": {}, "data": {}}
    monkeypatch.setattr("unicl_fast.conversion.sources.settings_of", lambda initial: nothing)
    flag = f"--{name}".replace("_", "-")
    for flags in (
        [flag, "runs/first"],
        [f"{flag}=runs/first"],
        [f"--model.{flag[2:]}", "runs/first"],
    ):
        arguments = parse_arguments(["--data.train", "x", "--out", "y", *flags])
        assert getattr(arguments.model, name) == "runs/first"


def test_every_field_is_documented():
    """The sentence under a field is its line of --help."""
    from unicl_fast.tools.pretrain import _first_sentences

    groups = [type(getattr(TrainConfig(), group.name)) for group in dataclasses.fields(TrainConfig)]
    for cls in (*groups, *map(objective_class, OBJECTIVES)):
        sentences = _first_sentences(cls)
        for field in dataclasses.fields(cls):
            assert len(sentences[field.name]) > 10, field.name
