"""Twenty steps of each small preset and every preset's settings are what the committed files say.

A change that is not meant to alter results leaves these files alone. One that is meant to runs
`python tests/golden/test_golden.py`, which writes them anew, and says in its commit why the new
curve is right. The images are drawn here, so that the curves need no data and the whole way is
under test: packing, order of samples, text of each sample, crops, loss, optimizer.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "helpers"))  # for a run as a script
from drawings import pack_drawings

from unicl_fast.config_json import config_to_dict
from unicl_fast.presets import PRESETS, build_preset
from unicl_fast.tools import pretrain
from unicl_fast.training.metrics import read_metrics

FOLDER = Path(__file__).parent
STEPS = 20
CASES = ("digits-small", "cifar10-small", "mixed-small")


def train_curve(preset: str, packed: tuple[Path, Path], run_folder: Path) -> list[float]:
    """The loss of each of the first 20 steps of 16 images in fp64."""
    data = packed[:1] if preset == "cifar10-small" else packed
    settings = {
        "run.global-batch-size": 16, "run.samples": 16 * STEPS, "run.log-every-steps": 1,
        "run.evaluate-every-steps": 0, "run.device": "cpu", "efficiency.precision": "fp64",
    }  # fmt: skip
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    pretrain.main(
        ["--preset", preset, "--data.train", *map(str, data), *arguments, "--out", str(run_folder)]
    )
    return [line["loss"] for line in read_metrics(run_folder) if "loss" in line]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pack_drawings(tmp_path_factory.mktemp("drawings"))


@pytest.mark.parametrize(
    "preset", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])]
)
def test_a_small_preset_gives_the_committed_loss_curve(preset, packed, tmp_path):
    committed = json.loads((FOLDER / "curves" / f"{preset}.json").read_text())
    found = train_curve(preset, packed, tmp_path / "run")
    # in fp64, since AdamW turns the rounding of fp32 into a percent within twenty steps
    np.testing.assert_allclose(found, committed, rtol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_committed_settings(preset):
    committed = json.loads((FOLDER / "presets" / f"{preset}.json").read_text())
    assert json.loads(json.dumps(config_to_dict(build_preset(preset)))) == committed


def main() -> None:
    """Writes the committed files anew."""
    with tempfile.TemporaryDirectory() as name:
        data = pack_drawings(Path(name))
        for preset in CASES:
            curve = train_curve(preset, data, Path(name) / preset)
            text = json.dumps(curve, indent=1)
            (FOLDER / "curves" / f"{preset}.json").write_text(text + "\n")
    for preset in PRESETS:
        settings = json.loads(json.dumps(config_to_dict(build_preset(preset))))
        text = json.dumps(settings, indent=1)
        (FOLDER / "presets" / f"{preset}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
