"""Each option has an effect, and what the config accepts can be trained."""

import ast
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trunk_table
from drawings import pack_drawings
from program_runs import call
from small_runs import StepLoader, labelled_loader, staged_batch, tiny_config

from unicl_fast.config import TrainConfig
from unicl_fast.objectives.registry import make_objective
from unicl_fast.tools import pretrain
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.metrics import read_metrics

OPTIONS = [(group, name) for group, names in trunk_table.options().items() for name in names]

# Another value for each option whose effect a run of four steps on a CPU shows, with what else the
# run needs for that.
CHANGES: dict[str, str] = {
    "data.fraction": "0.5 0.5",
    "data.evaluate": "LABELS",
    "data.image_size": "20",
    "data.crop_scale": "0.2 0.3",
    "data.crop_ratio": "2 2",
    "data.flip_probability": "1",
    "data.augment": "clip",
    "data.interpolation": "bicubic",
    "data.mean": "0.1 0.2 0.3",
    "data.std": "0.1 0.2 0.3",
    "data.shuffle_window": "16",
    "objective.name": "clip",
    "objective.logit_scale_init": "1.0",
    "objective.logit_scale_max": "1.0",
    "model.image_encoder": "test_vit",
    "model.drop_path": "0.9 --model.image-encoder test_vit",
    "model.text_width": "32",
    "model.text_layers": "1",
    "model.text_heads": "1",
    "model.text_activation": "gelu",
    "model.text_causal": "False",
    "model.text_pool": "last",
    "model.text_mlp_ratio": "2",
    "model.text_norm_eps": "0.1",
    "model.image_projection": "biased",
    "model.text_projection": "biased",
    "model.embed_dim": "16",
    "optim.name": "adamw",
    "optim.lr": "1e-4",
    "optim.lr_batch_size": "48",
    "optim.lr_min": "1e-3",
    "optim.warmup_fraction": "0.9",
    "optim.betas": "0.1 0.1",
    "optim.weight_decay": "0.9",
    "optim.clip_norm": "1e-3",
    "optim.freeze": "image",
    "optim.lora": "text:4",
    "optim.layer_decay": "0.1",
    "efficiency.precision": "fp32",
    "checkpoint.every_steps": "1",
    "checkpoint.keep": "1 --checkpoint.every-steps 1",
    "checkpoint.best": "none --data.evaluate LABELS --run.evaluate-every-steps 2",
    "run.seed": "7",
    "run.global_batch_size": "8",
    "run.samples": "24",
    "run.stages": "0.5:image_size=20",
    "run.log_every_steps": "2",
    "run.trackers": "",
    "run.evaluate_every_steps": "2 --data.evaluate LABELS",
}
PLAIN: dict[tuple[str, bool], dict[str, Any]] = {}
"""Fingerprints of runs without a change, by what else they were given."""
# What four steps on a CPU cannot show: other devices, other ranks, URLs, faults, data of other
# kinds, and what only changes time or memory.
READ_ELSEWHERE = {
    *("data.text", "data.max_pixels", "objective.positives", "model.context_length"),
    *("data.train", "data.sample_weights", "data.prompts", "data.evaluation_resize"),
    *("data.resample", "data.threads"),
    *("data.decode_device", "data.shuffle_groups", "data.cache_folder"),
    *("data.cache_bytes", "data.max_bad_fraction", "objective.num_classes"),
    *("model.vocab_size", "model.tokenizer"),
    *("model.init", "model.init_image", "model.init_text", "efficiency.activation_checkpointing"),
    *("efficiency.compile", "efficiency.window_attention", "efficiency.micro_batch_size"),
    *("efficiency.loss", "efficiency.stored_features", "efficiency.shard", "run.steps"),
    *("model.standardise", "model.feature_noise", "run.patience"),
    *("run.device", "run.max_bad_steps", "run.timeout_seconds"),
}


def test_every_option_is_among_those_that_are_tested():
    names = {f"{group}.{name}" for group, name in OPTIONS}
    assert names == CHANGES.keys() | READ_ELSEWHERE
    assert not CHANGES.keys() & READ_ELSEWHERE


def test_every_option_is_read_outside_of_the_config():
    read = {
        node.attr
        for path in trunk_table.files_of("unicl_fast", "pipelines", "tools")
        if path.name not in ("config.py", "presets.py")
        for node in ast.walk(trunk_table.tree_of(path))
        if isinstance(node, ast.Attribute)
    }
    read |= {"prompts", "lora", *INITIAL}  # lora as `adapters`
    assert {name for _, name in OPTIONS} <= read


INITIAL = ("init", "init_image", "init_text")  # read by `getattr`


def fingerprint(
    flags: str, packed: tuple[Path, Path], images: torch.Tensor, folder: Path, *, whole: bool
) -> dict[str, Any]:
    """The numbers and the files of a run: of the `whole` program, or only of its trainer."""
    labels, captions = map(str, packed)
    flags = flags.replace("LABELS", labels).replace("CAPTIONS", captions)
    given = re.findall(r"--[a-z.-]+", flags)
    base = {
        "--data.train": f"{labels} {captions}",
        "--data.image-size": "32",
        "--data.evaluation-resize": "32",
        "--run.samples": "48",
        "--run.global-batch-size": "12",
        "--run.log-every-steps": "1",
        "--run.evaluate-every-steps": "0",
        "--run.device": "cpu",
        "--efficiency.precision": "fp64",
        "--checkpoint.every-steps": "2",
    }
    rest = " ".join(f"{name} {value}" for name, value in base.items() if name not in given)
    arguments = f"--preset digits-small {rest} {flags} --out {folder}".split()
    if whole:
        call(pretrain, *arguments)
    else:
        config = pretrain.split_config(pretrain.parse_arguments(arguments))
        loader = StepLoader(images, make=functools.partial(staged_batch, config=config))
        make_trainer(config, loader, run_folder=folder, progress=False).fit()
    lines = [
        {key: value for key, value in line.items() if not re.search("second|memory|wait|mfu", key)}
        for line in read_metrics(folder)
    ]
    files = sorted(str(one.relative_to(folder)) for one in folder.rglob("*.*"))
    return {"lines": lines, "files": [re.sub(r"events\..*", "events", one) for one in files]}


@pytest.mark.slow
@pytest.mark.parametrize("option", CHANGES)
def test_an_option_has_an_effect(option, drawings, images, tmp_path):
    """Against the same run with the option's own default."""
    value, *needs = re.split(r" (?=--)", CHANGES[option], maxsplit=1)
    flag = f"--{option.replace('_', '-')}"
    if (option, value) == ("model.text_causal", "False"):
        flag, value = "--model.no-text-causal", ""
    rest = needs[0] if needs else ""
    whole = option.startswith(("data.", "objective.name")) or "LABELS" in rest
    run = functools.partial(fingerprint, packed=drawings, images=images, whole=whole)
    if (rest, whole) not in PLAIN:
        PLAIN[rest, whole] = run(rest, folder=tmp_path / "plain")
    changed = run(f"{flag} {value} {rest}", folder=tmp_path / "changed")
    assert json.dumps(PLAIN[rest, whole]) != json.dumps(changed)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pack_drawings(tmp_path_factory.mktemp("drawings"))


# Values that differ from the tiny config's.
ALTERNATES: list[tuple[str, str, Any]] = [
    ("model", "text_causal", False),
    ("model", "text_pool", "last"),
    ("model", "image_projection", "biased"),
    ("model", "image_encoder", "unicl_convnet7_small"),
    ("objective", "", make_objective("clip")),
    ("objective", "", make_objective("unicl", positives="labels")),
    ("objective", "", make_objective("sigmoid")),
    ("objective", "", make_objective("ce", num_classes=(9,))),
    ("data", "augment", ("unicl",)),
    ("optim", "name", "lamb"),
    ("optim", "name", "muon"),
    ("optim", "freeze", ("image",)),
    ("optim", "freeze", ("text", "image_projection")),
    ("optim", "lora", "image:2@last3,text:4"),
    ("optim", "layer_decay", 0.5),
    ("optim", "clip_norm", 0.0),
    ("efficiency", "precision", "bf16"),
    ("efficiency", "activation_checkpointing", True),
    ("efficiency", "micro_batch_size", 5),
    ("efficiency", "loss", "tiled"),
    ("run", "max_bad_steps", 1),
    ("run", "stages", ("0.5:micro_batch_size=4",)),
]


def pairs() -> Iterator[tuple[tuple[str, str, Any], tuple[str, str, Any]]]:
    """Pairs of changes of different options."""
    for one, other in itertools.combinations(ALTERNATES, 2):
        if one[:2] != other[:2]:
            yield one, other


def with_changes(*changes: tuple[str, str, Any]) -> TrainConfig:
    config = tiny_config(steps=3)
    groups: dict[str, Any] = {}
    for group, name, value in changes:
        before = groups.get(group, getattr(config, group))
        groups[group] = dataclasses.replace(before, **{name: value}) if name else value
    return dataclasses.replace(config, **groups)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute of CPU time, on a busy machine too
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in (1, 2, 3))]
)
def test_pairs_of_options_train_or_are_refused_by_name(images, part):
    """Three steps end with a finite loss, or a sentence before the first names an option."""
    trained, faults = 0, []
    for changes in itertools.islice(pairs(), part, None, 4):
        names = [name or f"objective.name={value.name}" for _, name, value in changes]
        try:
            config = with_changes(*changes)
            objective = config.objective
            kind = ", labels" if objective.takes_all_labels else ""
            loader = labelled_loader(images, f"{objective.name}{kind}")
            trainer = make_trainer(config, loader, progress=False)
        except ValueError as error:
            said = str(error)
            if not any(name.split(".")[-1] in said for name in names):
                faults.append(f"{names}: {said}")
            continue
        trainer.fit()
        if not all(bool(one.isfinite().all()) for one in trainer.model.parameters()):
            faults.append(f"{names}: weights are not finite")
        trained += 1
    assert not faults, "\n".join(faults)
    assert trained > 35
