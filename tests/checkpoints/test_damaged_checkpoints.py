"""A damaged checkpoint or config is a clear error for all readers."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from damage import make_fit
from damaged_files import damaged_bytes, damaged_json, damaged_safetensors
from hypothesis import given
from hypothesis import strategies as st
from property_tests import examples
from safetensors.torch import load_file, save_file
from small_runs import tiny_config, trainer_of

from unicl_fast.checkpoints.files import Best, find_best, write_best
from unicl_fast.checkpoints.load import DamagedCheckpointError, find_checkpoint, read_state
from unicl_fast.config_json import config_to_dict, load_config
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.ledger.format import (
    LedgerSource,
    SegmentHeader,
    encode_header,
    encode_record,
    segment_name,
)
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.tools import ledger
from unicl_fast.training.metrics import read_metrics
from unicl_fast.training.trainer import Trainer

NUM_DRAWS = 12


@pytest.fixture(scope="module")
def whole_run(trainer: Trainer, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every file that is read again: of a checkpoint, and a ledger."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(run_folder, folder)
    (folder / "config.json").write_text(json.dumps(config_to_dict(trainer.config)))
    write_best(folder / "checkpoints", Best(2, "zero_shot/digits/top1", 0.5))
    (folder / "ledger").mkdir()
    records = b"".join(
        encode_record(
            LEDGER_HEADER,
            step=step,
            source_ids=np.arange(NUM_DRAWS) % 2,
            scheduled_ids=np.arange(NUM_DRAWS) // 2,
            shown_ids=np.arange(NUM_DRAWS)[::-1] // 2,
        )
        for step in range(2)
    )
    (folder / SEGMENT).write_bytes(encode_header(LEDGER_HEADER) + records)
    return folder


LEDGER_HEADER = SegmentHeader(
    segment=1,
    start_step=0,
    rank=0,
    world_size=1,
    global_batch_size=NUM_DRAWS,
    sources=(LedgerSource("photos", 6), LedgerSource("pairs", 100)),
    seed=0,
    shares=(1, 1),
    shuffle_window=40,
    run_id="a",
)
CHECKPOINT = "checkpoints/step-00000002"
SEGMENT = f"ledger/{segment_name(1, 0)}"


def use(folder: Path, name: str, trainer: Trainer) -> None:
    """Reads a file of a run as the programs do; raises what they would print."""
    checkpoints, checkpoint = folder / "checkpoints", folder / CHECKPOINT
    if name == "config.json":
        load_config(folder / name)
    elif name == "metrics.jsonl":
        find_best(checkpoints, metric="loss", lines=read_metrics(folder))
    elif name == "checkpoints/best.json":
        find_best(checkpoints, metric=None, lines=[])
        find_checkpoint(folder / "best")
    elif name == SEGMENT:
        with pytest.raises(SystemExit) as end:
            ledger.main([str(folder), "--replan", "--json", str(folder / "ledger.json")])
        assert end.value.code in (0, 1, 2)
    elif name == f"{CHECKPOINT}/state.json":
        ledger.newest_checkpoint(folder)
        read_state(checkpoint)
    else:
        load_encoders(checkpoint)
        trainer.resume(checkpoint)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("config.json", "whole"),
        ("metrics.jsonl", "first line"),
        ("checkpoints/best.json", "whole"),
        (f"{CHECKPOINT}/state.json", "with its checksum"),
        (SEGMENT, "header"),
        (SEGMENT, "record"),
        *(
            pytest.param(f"{CHECKPOINT}/{name}.safetensors", part, marks=pytest.mark.slow)
            for name in ("model", "optimizer")
            for part in ("whole", "with its checksum")
        ),
    ],
)
def test_any_change_to_a_file_of_a_run_is_a_clear_error_or_none(whole_run, trainer, name, part):
    path = whole_run / name
    originals = {one: one.read_bytes() for one in {path, whole_run / CHECKPOINT / "state.json"}}

    @examples(200)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = damaged_part(data, path, originals[path], part)
        path.write_bytes(changed)
        if part == "with its checksum":
            make_fit(path.parent)
        try:
            use(whole_run, name, trainer)
        except (ValueError, FileNotFoundError) as error:  # our own words, not a library's
            kinds = (ValueError, FileNotFoundError, DamagedCheckpointError)
            assert type(error) in kinds, repr(error)  # noqa: PT017
            assert str(whole_run) in str(error)  # noqa: PT017
        else:
            assert (path.suffix, part) != (".safetensors", "whole") or changed == originals[path]
        finally:
            for one, content in originals.items():
                one.write_bytes(content)

    check()


def damaged_part(data: st.DataObject, path: Path, original: bytes, part: str) -> bytes:
    """Other values in a part of a file, around which all checksums are right."""
    if path.suffix == ".safetensors":
        return bytes(data.draw(damaged_safetensors(original) | damaged_bytes(original)))
    if part == "first line":
        first, rest = original.split(b"\n", 1)
        return bytes(data.draw(damaged_json(first))) + b"\n" + rest
    if part not in ("header", "record"):
        return bytes(data.draw(damaged_json(original)))
    size = len(encode_header(LEDGER_HEADER))
    start, body = original[:size], bytearray(original[size:])
    if part == "header":
        text = data.draw(damaged_json(original[16:size]))
        return original[:8] + struct.pack("<II", len(text), low_digest(text)) + text + bytes(body)
    length = LEDGER_HEADER.record_bytes(NUM_DRAWS)
    at = data.draw(st.integers(8, length - 1))
    body[at : at + 8] = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f"]))
    body[4:8] = struct.pack("<I", low_digest(body[8:length]))
    return start + bytes(body)


def low_digest(data: bytes) -> int:
    return int(xxhash.xxh3_64_intdigest(data)) & 0xFFFFFFFF


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def trainer(images: torch.Tensor, run_folder: Path) -> Trainer:
    config = tiny_config(steps=2)
    trainer = trainer_of(images, config, run_folder)
    trainer.fit()
    return trainer


@pytest.fixture
def checkpoint(trainer: Trainer, run_folder: Path, tmp_path: Path) -> Path:
    place = run_folder / CHECKPOINT
    return Path(shutil.copytree(place, tmp_path / place.name))


def change_state(checkpoint: Path, **changes: Any) -> None:
    """Writes another state with a seal that fits."""
    state = parse_checksummed_json((checkpoint / "state.json").read_bytes())
    for name, value in changes.items():
        holder = state
        *groups, last = name.split("__")
        for group in groups:
            holder = holder[group]
        holder[last] = value
    (checkpoint / "state.json").write_text(dump_checksummed_json(state))


def change_tensors(checkpoint: Path, file: str, **changes: torch.Tensor | None) -> None:
    tensors = load_file(checkpoint / file)
    tensors = {name: one for name, one in (tensors | changes).items() if one is not None}
    save_file(tensors, checkpoint / file)
    make_fit(checkpoint)


def test_every_flipped_digit_of_the_state_and_a_missing_seal_are_found(checkpoint):
    original = (checkpoint / "state.json").read_bytes()
    digits = [place for place, byte in enumerate(original) if chr(byte).isdigit()]
    for place in digits[::3]:
        data = bytearray(original)
        data[place] = ord("0") + (data[place] - ord("0") + 1) % 10
        (checkpoint / "state.json").write_bytes(data)
        with pytest.raises(DamagedCheckpointError, match=r"state\.json is damaged"):
            read_state(checkpoint)
    (checkpoint / "state.json").write_text(json.dumps(parse_checksummed_json(original)))
    with pytest.raises(DamagedCheckpointError, match="not what was written"):
        read_state(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, r"step must be a whole number in \[0, 9007199254740992\), not -1"),
        ({"step": "2"}, r"step must be a whole number in .*, not '2'"),
        ({"run_id": 3}, "run_id must be a text, not 3"),
        ({"checksums": {}}, "checksums are of no file"),
        ({"checksums__../../x": "0"}, "checksums are of"),
        ({"scaler": {"scale": float("nan")}}, r"scaler's scale must be a number in \[0, inf\)"),
        ({"config__model__vocab_size": 2**23}, "not the model that its config describes"),
        ({"config__model__text_width": 65_536}, "not the model that its config describes"),
        ({"config__model__text_width": 10**9}, "model.text_width must be .* in 1 to 65536"),
        ({"config__model__text_heads": 0}, "model.text_heads must be a whole number in 1"),
        ({"config__model__embed_dim": 2.5}, "config: model.embed_dim must be a whole number"),
        ({"config__data__image_size": 10**6}, "data.image_size must be .* in 1 to 8192"),
        ({"config__model__image_encoder": "resnet50"}, "not the model that its config describes"),
        ({"config__model__vocab_size": 1}, "do not fit the model that its config describes"),
        ({"config": []}, "config must be an object, not \\[\\]"),
    ],
)
def test_states_that_cannot_be_are_refused_before_anything_is_built(checkpoint, changes, message):
    change_state(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        load_encoders(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avg.text_projection": torch.zeros(1)}, r"exp_avg\.text_projection is \[1\]"),
        ({"exp_avg.text_projection": None}, "some parameters have more of it"),
        ({"exp_avg.nothing": torch.zeros(3)}, r"no exp_avg\.nothing"),
        ({"group_step.77": torch.tensor(1)}, r"no group_step\.77"),
        ({"step.text_projection": torch.tensor(float("nan"))}, "no count"),
        ({"exp_avg.logit_scale": torch.tensor(1)}, r"logit_scale holds torch\.int64"),
    ],
)
def test_an_optimizers_state_that_does_not_fit_is_not_spread_over_the_model(
    trainer, checkpoint, changes, message
):
    change_tensors(checkpoint, "optimizer.safetensors", **changes)
    with pytest.raises(DamagedCheckpointError, match=message):
        trainer.resume(checkpoint)


def test_whole_numbers_are_no_weights(trainer, checkpoint):
    change_tensors(checkpoint, "model.safetensors", logit_scale=torch.tensor(1))
    for use in (trainer.resume, load_encoders):
        with pytest.raises(ValueError, match="logit_scale holds torch.int64"):
            use(checkpoint)
