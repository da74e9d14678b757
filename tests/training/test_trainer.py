"""Runs in memory: resuming, run folders, what is refused, what stops a run."""

import dataclasses
import functools
import itertools
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from compared_runs import assert_equal, last_of, losses_of, state_of
from small_runs import StepLoader, labelled_loader, objective_config, tiny_config, trainer_of

from unicl_fast.batch import Batch, ReadingTime
from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.checkpoints.load import read_state
from unicl_fast.config import DataConfig, RunConfig, TrainConfig
from unicl_fast.config_json import config_from_dict, load_config
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.registry import make_objective
from unicl_fast.training import build, run
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.observers import RunLog
from unicl_fast.training.run import pretrain
from unicl_fast.training.trainer import Observer


def test_a_batch_is_let_go_before_the_next_one_is_requested(images):
    held: list[weakref.ref[torch.Tensor]] = []

    class Watching(StepLoader):
        def batches(self, start_step: int) -> Iterator[Batch]:
            for batch in super().batches(start_step):
                assert all(one() is None for one in held)
                own = dataclasses.replace(batch, images=batch.images.clone())
                held.append(weakref.ref(own.images))
                del batch
                yield own
                del own

    make_trainer(tiny_config(), Watching(images), progress=False).fit()
    assert len(held) == tiny_config().run.total_steps


VIT, CONVNET, FROZEN = "test_vit", "unicl_convnet7_small", ("image:2", "text")
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("image_encoder", "precision", "optimizer", "frozen", "micro_batch_size"),
    [
        (VIT, "fp32", "adamw", FROZEN, 0),
        (VIT, "fp32", "muon", (), 0),
        pytest.param(VIT, "fp16", "lamb", (), 0, marks=slow),
        pytest.param(VIT, "fp16", "adamw", (), 0, marks=slow),
        pytest.param(VIT, "bf16", "adamw", FROZEN, 5, marks=slow),
        pytest.param(VIT, "fp64", "lamb", FROZEN, 0, marks=slow),
        pytest.param(CONVNET, "bf16", "adamw", (), 0, marks=slow),
        pytest.param(CONVNET, "fp32", "lamb", FROZEN, 0, marks=slow),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    images, tmp_path, image_encoder, precision, optimizer, frozen, micro_batch_size
):
    config = tiny_config(
        image_encoder=image_encoder, precision=precision, optimizer=optimizer,
        micro_batch_size=micro_batch_size,
    ).changed(optim={"freeze": frozen})  # fmt: skip
    trainer_of(images, config, tmp_path / "unbroken").fit()
    resumed = trainer_of(images, config, tmp_path / "resumed")
    resumed.resume(tmp_path / "unbroken" / "checkpoints" / "step-00000004")
    assert resumed.step == 4
    resumed.fit()
    runs = tmp_path / "resumed", tmp_path / "unbroken"
    assert_equal(*(state_of(last_of(run)) for run in runs))
    assert losses_of(runs[0]) == losses_of(runs[1])[4:]


def test_a_run_folder_holds_what_was_promised(images, tmp_path):
    trainer = trainer_of(images, folder=tmp_path)
    trainer.data = {"train": ["images"]}
    trainer.fit()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["samples_seen"] == 72
    assert {"loss", "logit_scale", "lr", "grad_norm", "images_per_second"} <= lines[0].keys()
    assert 0 <= lines[0]["data_wait_fraction"] <= 1
    assert list((tmp_path / "tensorboard").glob("events.*"))
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000002", "step-00000004", "step-00000006"]
    state = read_state(tmp_path / "checkpoints" / "step-00000006")
    assert (state.step, state.config, state.data) == (6, trainer.config, trainer.data)
    assert_equal(trainer.model.state_dict(), load_encoders(tmp_path).state_dict())


def test_going_back_leaves_no_checkpoint_of_the_abandoned_steps(images, tmp_path):
    trainer_of(images, folder=tmp_path).fit()
    again = trainer_of(images, folder=tmp_path)
    again.resume(tmp_path / "checkpoints" / "step-00000002")
    unfinished = tmp_path / "checkpoints" / ".step-00000005.partial"
    unfinished.mkdir()

    again.loader.batches = Mock(side_effect=NotImplementedError)
    with pytest.raises(NotImplementedError):
        again.fit()
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["step-00000002", "step-00000004.aside", "step-00000006.aside"]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == found[:1]


def test_another_model_or_other_data_is_refused(images, tmp_path):
    trainer_of(images, folder=tmp_path).fit()
    checkpoint = tmp_path / "checkpoints" / "step-00000006"
    plain = tiny_config()
    for message, config in {
        "another model: text_width was 16 and is now 32": plain.changed(model={"text_width": 32}),
        "another run: seed was 0 and is now 1": plain.changed(run={"seed": 1}),
        "another data: shuffle_groups was 128 and is now 8": (
            plain.changed(data={"shuffle_groups": 8})
        ),
        "precision was 'fp64' and is now 'fp16'": tiny_config(precision="fp16"),
        "the state of AdamW, but optim.name now means Lamb": tiny_config(optimizer="lamb"),
    }.items():
        with pytest.raises(ValueError, match=message):
            trainer_of(images, config).resume(checkpoint)
    other = trainer_of(images, folder=tmp_path / "c")
    other.data = {"train": ["other images"]}
    with pytest.raises(ValueError, match="another data"):
        other.resume(checkpoint)


def test_the_first_scale_of_a_resumed_run_does_not_count(images, tmp_path):
    small = dataclasses.replace(tiny_config(), objective=make_objective(logit_scale_init=1.0))
    trainer_of(images, small, tmp_path).fit()
    resumed = trainer_of(images, folder=tmp_path / "b")
    assert resumed.model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    resumed.resume(tmp_path / "checkpoints" / "step-00000006")
    assert resumed.model.logit_scale.item() == pytest.approx(1, abs=0.01)


def test_a_run_of_muon_resumes_with_more_frozen(images, tmp_path):
    config = tiny_config(optimizer="muon", precision="fp32")
    trainer_of(images, config, tmp_path).fit()
    resumed = trainer_of(images, config.changed(optim={"freeze": ("text",)}), tmp_path / "b")
    resumed.resume(tmp_path / "checkpoints" / "step-00000006")
    assert resumed.step == 6


def test_a_run_without_a_length_is_refused(images):
    with pytest.raises(ValueError, match=r"set run.samples or run.steps"):
        trainer_of(images, tiny_config(steps=0))


@pytest.mark.parametrize("level", ["WARNING", "INFO"])
def test_evaluations_run_at_their_steps_and_are_written(images, tmp_path, caplog, capsys, level):
    """A program has them in its log, and so in its log file; a notebook without a log sees them."""
    caplog.set_level(level)
    config = tiny_config().changed(run={"log_every_steps": 6, "evaluate_every_steps": 4})
    trainer = trainer_of(images, config, tmp_path)
    modes = []

    def evaluation(model: torch.nn.Module) -> dict[str, float]:
        modes.append(model.training)
        return {"top1": 0.5}

    trainer.evaluations = {"digits": evaluation}
    trainer.fit()
    assert modes == [False, False]
    lines = [line for line in read_metrics(tmp_path) if "digits/top1" in line]
    assert [line["step"] for line in lines] == [4, 6]
    shown = {"WARNING": capsys.readouterr().err, "INFO": caplog.text}
    assert [name for name in shown if "step 4, digits: top1 0.5" in shown[name]] == [level]


def test_classes_are_refused_where_a_text_is_its_own_class(images):
    clip = objective_config("clip", steps=1)
    with pytest.raises(ValueError, match="objective.name=clip: .* labels of -1"):
        trainer_of(images, clip).fit()
    make_trainer(clip, labelled_loader(images, "clip"), progress=False).fit()


def test_a_decoder_on_a_gpu_is_refused_where_none_trains(tmp_path):
    config = TrainConfig(data=DataConfig(decode_device="gpu"), run=RunConfig(device="cpu"))
    too_late = Mock(side_effect=AssertionError("it comes too late"))
    with pytest.raises(ValueError, match=r"run is on the CPU: set data\.decode_device=auto"):
        pretrain(config, run_folder=tmp_path, build_loader=too_late, evaluate=too_late)


def config_of_labels(data: Path) -> TrainConfig:
    return dataclasses.replace(
        tiny_config(steps=2),
        data=DataConfig(train=(str(data / "labels"),), image_size=32, evaluation_resize=32),
    )


@pytest.fixture(name="start")
def pretrain_on_twelve_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: torch.Tensor
) -> Callable[..., None]:
    """Begins a run, or resumes it, whose loader needs no decoder."""
    loader = StepLoader(images)
    loader.plan = SimpleNamespace(epochs=lambda steps: [1.0], weights=(1,))
    loader.reading = ReadingTime()
    monkeypatch.setattr(build, "check_memory", lambda config, **arguments: None)
    monkeypatch.setattr(build, "DatasetNumbers", lambda names, **_: Observer())
    monkeypatch.setattr(run, "_report", lambda *arguments: None)
    build_loader = Mock(return_value=loader)
    return functools.partial(
        pretrain, run_folder=tmp_path, build_loader=build_loader, evaluate=dict
    )


def test_a_run_keeps_what_was_given_and_which_decoder_auto_took(tmp_path, data, start):
    """So a run that resumes with another one says so."""
    config = config_of_labels(data)
    assert config.data.decode_device == "auto"
    start(config)
    assert load_config(tmp_path / "config.json") == config
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    assert read_state(checkpoint).config.data.decode_device == "cpu"
    stored = json.loads((checkpoint / "state.json").read_text())
    assert config_from_dict(stored["config"]) == config


def test_a_run_reads_initial_weights_at_its_first_start_alone(tmp_path, data, start, caplog):
    config = config_of_labels(data).changed(model={"init": "somewhere"})
    started: list[torch.Tensor] = []

    def initialise(model: UniCL, ranks: Ranks) -> None:
        with torch.no_grad():
            model.image_projection.fill_(0.5)
        started.append(model.image_projection.detach().clone())

    start(config, initialise=initialise)
    assert len(started) == 1
    (newest,) = list_checkpoints(tmp_path / "checkpoints")
    weights = load_encoders(newest).image_projection
    assert (weights - 0.5).abs().max() < 0.1  # it trained from there
    longer = config.changed(run={"steps": 4})
    for name in ("", "elsewhere"):
        config = longer.changed(model={"init": name})
        start(config, initialise=initialise, resume="auto")
        assert json.loads((tmp_path / "config.json").read_text())["model"]["init"] == name
    assert len(started) == 1
    said = "model.init=elsewhere is not read: the run resumes, and started from somewhere"
    assert said in caplog.text
    assert read_state(last_of(tmp_path)).config.model.init == "somewhere"


@pytest.mark.parametrize(("scale", "is_said"), [(5.5, True), (math.log(100), False)])
def test_a_learnt_scale_above_the_limit_is_said(data, start, caplog, scale, is_said):
    def initialise(model: UniCL, ranks: Ranks) -> None:
        with torch.no_grad():
            model.learnt["logit_scale"].fill_(scale)

    start(config_of_labels(data).changed(model={"init": "somewhere"}), initialise=initialise)
    said = "a scale of exp(5.5), and the first step lowers it to exp(4.605): --objective"
    assert (said in caplog.text) == is_said == ("lowers it" in caplog.text)


def test_a_run_tells_its_trainer_how_long_the_loader_waits(monkeypatch, tmp_path, data):
    config = dataclasses.replace(tiny_config(), data=DataConfig(train=(str(data / "labels"),)))
    loader = SimpleNamespace(plan=SimpleNamespace(epochs=list), reading=ReadingTime())
    monkeypatch.setattr(build, "check_memory", lambda config, **arguments: None)
    trainer = build.build_trainer(
        config, run_folder=tmp_path, build_loader=lambda *arguments, **settings: loader,
        evaluate=dict, ranks=Ranks(), device=torch.device("cpu"),
    )  # fmt: skip
    log = next(observer for observer in trainer.observers if isinstance(observer, RunLog))
    with log.fitting(trainer):
        assert log._watch._reading is loader.reading


def test_a_loader_that_ends_before_the_run_is_refused(images):
    loader = StepLoader(images)
    three = itertools.islice(loader.batches(0), 3)
    loader.batches = lambda start_step: three
    with pytest.raises(ValueError, match="the loader ended before step 3 of 6"):
        make_trainer(tiny_config(steps=6), loader, progress=False).fit()
