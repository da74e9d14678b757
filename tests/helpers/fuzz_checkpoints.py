"""Damages a checkpoint in every way and looks what comes: run as a program, in a process.

    python fuzz_checkpoints.py FOLDER EXAMPLES

FOLDER is made here: a run of two steps with its checkpoint. Half of the damage is as disks do it,
half as somebody with intentions would: checksums and seal are made to fit again, so that what is
behind them is tried too. A crash of the interpreter ends this process with a signal, which the test
that started it sees.
"""

import functools
import json
import logging
import sys
from pathlib import Path

import torch
from damaged_files import damaged_bytes, damaged_json, damaged_safetensors, fuzz_files, run_fuzzer
from hypothesis import strategies as st
from small_runs import StepLoader, tiny_config

from unicl_fast.checkpoints.load import DamagedCheckpointError
from unicl_fast.config_json import config_to_dict, load_config
from unicl_fast.conversion.initial import load_encoders
from unicl_fast.system.checksums import dump_checksummed_json, file_checksum
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.trainer import Trainer

fuzz = functools.partial(run_fuzzer, __file__)


def is_clear(error: Exception) -> bool:
    """Our own words, not an error of a library passed on."""
    return type(error) in (ValueError, FileNotFoundError, DamagedCheckpointError) and bool(
        str(error)
    )


def make_fit(checkpoint: Path) -> None:
    """Checksums and seal of what is there now; a state that is no JSON stays as it is."""
    try:
        state = json.loads((checkpoint / "state.json").read_bytes())
        for name in state["checksums"]:
            state["checksums"][name] = file_checksum(checkpoint / name)
        state.pop("seal", None)
        (checkpoint / "state.json").write_text(dump_checksummed_json(state))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return


def same_state(trainer: Trainer, expected: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items()
    )


def main(folder: Path, examples: int) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of settings that differ, which is not an error
    config = tiny_config(steps=2, precision="fp16")
    images = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8)
    trainer = make_trainer(config, StepLoader(images), run_folder=folder, progress=False)
    trainer.data = {"classes": ["cat", "dog"]}
    trainer.fit()
    checkpoint = folder / "checkpoints" / "step-00000002"
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    paths = [*checkpoint.iterdir(), folder / "config.json"]
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def damaged(path: Path, content: bytes) -> st.SearchStrategy[bytes]:
        structured = damaged_json if path.suffix == ".json" else damaged_safetensors
        return st.one_of(structured(content), structured(content), damaged_bytes(content))

    def attempt(path: Path, fitting: bool, resume: bool) -> str:
        if fitting:
            make_fit(checkpoint)
        if path.name == "config.json":
            load_config(path)
            return "fits"
        if resume:
            trainer.resume(checkpoint)
        else:
            load_encoders(checkpoint)
        if fitting:
            return "fits"
        assert same_state(trainer, expected)
        assert trainer.step == 2
        return "same"

    originals = {path: path.read_bytes() for path in paths}
    fuzz_files(originals, damaged, attempt, lambda _, error: is_clear(error), examples=examples)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
