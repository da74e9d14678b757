"""A checkpoint holds the state of a run, and nothing of the data path."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from damage import flip_a_byte, make_fit
from rank_workers import resume_and_write, run_on_ranks
from safetensors.torch import load_file, save_file
from small_runs import StepLoader, tiny_config, trainer_of

from unicl_fast.checkpoints.files import list_checkpoints, write_checkpoint
from unicl_fast.checkpoints.load import CheckpointState, build_model, find_sound_checkpoint
from unicl_fast.checkpoints.state import refuse_another_run
from unicl_fast.config_json import config_to_dict
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models import compilation
from unicl_fast.system.checksums import parse_checksummed_json
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.memory_plan import build_on_meta
from unicl_fast.training.settle import Setup, with_kernels

DATA = {"sources": [{"num_samples": 12}]}
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


@pytest.mark.parametrize(
    ("optimizer", "of_a_parameter", "of_all"),
    [("adamw", {"exp_avg", "exp_avg_sq", "step"}, set()),
     ("lamb", {"exp_avg", "exp_avg_sq"}, {"group_step.0", "group_step.1"})],
)  # fmt: skip
def test_a_checkpoint_is_config_step_weights_optimizer_and_scaler(
    images, tmp_path, optimizer, of_a_parameter, of_all
):
    config = tiny_config(optimizer=optimizer, steps=4)
    loader = StepLoader(images)
    trainer = make_trainer(config, loader, run_folder=tmp_path, data=DATA, progress=False)
    trainer.fit()
    earlier, newest = list_checkpoints(tmp_path / "checkpoints")
    expected = {"model.safetensors": set(trainer.model.state_dict())}
    expected["optimizer.safetensors"] = of_all | {
        f"{key}.{name}" for key in of_a_parameter for name, _ in trainer.model.named_parameters()
    }
    assert {path.name for path in newest.iterdir()} == {*expected, "state.json"}
    for file, names in expected.items():
        assert set(load_file(newest / file)) == names, file
    deeper = make_trainer(config.changed(optim={"layer_decay": 0.9}), loader, progress=False)
    deeper.data = trainer.data
    deeper.resume(newest)  # whose optimizer has more groups
    assert {float(group.get("step", 4)) for group in deeper.optimizer.param_groups} == {4}
    state, before = (
        parse_checksummed_json((path / "state.json").read_bytes()) for path in (newest, earlier)
    )
    assert state == {
        "step": 4,
        "run_id": trainer.run_id,
        "config": json.loads(json.dumps(config_to_dict(config))),
        "settled": {"efficiency": {"compile": "off", "window_attention": "timm"}},
        "scaler": {},
        "data": DATA,
        "optimizer": {"adamw": "AdamW", "lamb": "Lamb"}[optimizer],
        "checksums": state["checksums"],
    }
    assert set(state["checksums"]) == set(expected)
    # two steps, and so two batches, later: nothing but the step and the files has moved
    assert state | {"step": 0, "checksums": 0} == before | {"step": 0, "checksums": 0}


def test_a_checkpoint_with_an_average_of_its_weights_is_refused_in_a_sentence(tmp_path):
    config = tiny_config(precision="fp32")
    weights = build_model(config).state_dict()
    for decay, found in ((0.0, nullcontext()), (0.9, pytest.raises(ValueError))):
        old = config_to_dict(config)
        old["optim"]["ema_decay"] = decay
        write_checkpoint(
            tmp_path / f"{decay}" / "checkpoints",
            step=2,
            files={"model.safetensors": weights, "ema.safetensors": weights,
                   "optimizer.safetensors": {}},
            state={"config": old, "scaler": {}, "data": {}, "optimizer": "AdamW", "run_id": "a"},
        )  # fmt: skip
        with found as refusal:
            assert find_sound_checkpoint(tmp_path / f"{decay}") is not None
    said = "state.json: config: optim.ema_decay=0.9 is not a field of this version, which no longer"
    assert f"{said} has that option. Resume or export it" in str(refusal.value)


def test_a_scaler_that_is_used_is_part_of_it(images, tmp_path):
    config = tiny_config(precision="fp16", steps=1)
    trainer_of(images, config, tmp_path).fit()
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    state = parse_checksummed_json((checkpoint / "state.json").read_bytes())
    assert set(state["scaler"]) == SCALER


def test_kernels_that_another_device_has_are_logged_when_a_run_resumes(monkeypatch, caplog):
    pytest.importorskip("triton")
    config = tiny_config(image_encoder="unicl_swin6_small", precision="bf16")
    model, gpu = build_on_meta(config, "cuda"), torch.device("cuda")
    obstacle = ""
    monkeypatch.setattr(compilation, "obstacle_to_triton", lambda *_, **__: obstacle)
    monkeypatch.setattr(compilation, "fault_in_trial", lambda *_: "")
    setup = Setup(given=config, config=config, ranks=Ranks(), device=gpu)
    on_a100 = with_kernels(setup, model).config
    obstacle = "the GPU is too old for Triton"
    on_t4 = with_kernels(setup, model).config
    state = CheckpointState(
        1, on_a100, scaler={}, data={}, optimizer="AdamW", checksums={}, run_id="a"
    )
    model.config = on_a100
    refuse_another_run(state, model, {})
    assert not caplog.messages
    model.config = on_t4
    refuse_another_run(state, model, {})
    assert caplog.messages == [
        "resuming with efficiency.compile = 'off'; the checkpoint was written with 'blocks'",
        "resuming with efficiency.window_attention = 'timm'; the checkpoint was written with "
        "'triton'",
    ]


@pytest.mark.slow
def test_rank_0_reads_a_checkpoint_for_all_ranks(images, tmp_path):
    """Rank 1 has no such file: it gets what rank 0 read, bit for bit, or the same error."""
    config = tiny_config(precision="fp32", steps=2)
    trainer = trainer_of(images, config, tmp_path / "run")
    trainer.fit()
    (sound,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    folders = [Path(shutil.copytree(sound, tmp_path / name)) for name in ("a", "b", "c")]
    flipped = folders[1] / "optimizer.safetensors"
    flip_a_byte(flipped)
    save_file({"x": torch.zeros(2)}, folders[2] / "model.safetensors")
    make_fit(folders[2])

    run_on_ranks(resume_and_write, 2, images, folders, config)
    written = [
        [torch.load(tmp_path / f"{folder.name}-{rank}.pt") for rank in range(2)]
        for folder in folders
    ]
    for found, tensors in written[0]:
        assert found == [2, trainer.run_id, {}]
        assert set(tensors) == {path.name for path in sound.glob("*.safetensors")}
        for file, values in tensors.items():
            for name, expected in load_file(sound / file).items():
                assert values[name].dtype == expected.dtype
                assert torch.equal(values[name], expected), name
    for number, message in [(1, f"{flipped} is damaged"), (2, "do not fit the model")]:
        assert all(message in found for found, _ in written[number])
