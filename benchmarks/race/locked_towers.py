"""open_clip's own loop from the two towers of `photos-heads`, both locked.

docs/results.md has its rows beside `photos-heads`, and its command:
`python -m benchmarks.race.locked_towers --train packed/train --test packed/held-out --out FOLDER`.
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from unicl_fast.conversion.open_clip import CONFIG_FILE, WEIGHTS_FILE, write_open_clip
from unicl_fast.system.atomic_files import make_folder

from ..harness import end_of, module_command, run_apart
from .contestants import ImageList


def main() -> None:
    """Entry point: trains, measures the CPU seconds, and evaluates what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--train", help="a packed data set with captions, labels or both")
    parser.add_argument("--test", help="a packed data set to evaluate on")
    parser.add_argument("--out", type=Path, help="folder for the run; must not exist")
    parser.add_argument("--passes", type=int, default=1, help="how often each row is seen")
    parser.add_argument("--rows", type=int, default=1, help="rows of an image, with a text each")
    parser.add_argument("--context-length", type=int, default=77, help="padding costs time")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-mode", action="store_true", help="no dropout, no batch statistics")
    options = parser.parse_args()
    if options.loop:
        _loop(json.loads(options.loop.read_text(encoding="utf-8")))
        return
    if None in (options.train, options.test, options.out):
        parser.error("--train, --test and --out are needed")
    make_folder(options.out)
    start = options.out / "start"
    _write_start(options.train, options.context_length, start)
    images = ImageList([options.train], options.out / "images")
    count = images.num_images * options.rows
    images.write_rows(options.out / "rows.tsv", count, seed=options.seed)
    batch = min(options.batch_size, count)
    steps = options.passes * (count // batch)
    job = {
        "eval_mode": options.eval_mode,
        "options": [
            *("--train-data", str(options.out / "rows.tsv"), "--dataset-type", "csv"),
            *("--model", f"local-dir:{start.absolute()}", "--lock-image", "--lock-text"),
            *("--batch-size", str(batch), "--epochs", str(options.passes)),
            *("--lr", str(options.lr), "--warmup", str(round(0.1 * steps))),
            *("--aug-cfg", "scale=(1.0,1.0)", "--seed", str(options.seed)),
            *("--workers", "1", "--device", "cpu", "--precision", "fp32"),
            *("--logs", str(options.out), "--name", "run", "--save-frequency", "0"),
        ],
    }
    path = options.out / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    command = [*module_command("race.locked_towers"), "--loop", str(path)]
    log = options.out / "train.log"
    ended = run_apart(command, log, environment={"OMP_NUM_THREADS": "1"})
    if ended.code != 0:
        raise RuntimeError(f"open_clip's loop ended with {ended.code}:\n{end_of(log)}")
    checkpoint = options.out / "run" / "checkpoints" / f"epoch_{options.passes}.pt"
    cost = {"steps": steps, "cpu_seconds": round(ended.cpu_seconds, 1)}
    print(json.dumps(cost | _judge(start, checkpoint, options.test)))


def _write_start(train: str, length: int, folder: Path) -> None:
    """Writes both towers with fresh linear heads, in open_clip's layout."""
    from unicl_fast.checkpoints.load import build_model
    from unicl_fast.conversion.initial import initialise
    from unicl_fast.tools.pretrain import parse_arguments, split_config

    given = [
        *("--preset", "photos-heads", "--data.train", train, "--out", "."),
        *("--model.no-standardise", "--model.feature-noise", "0"),
        *("--model.context-length", str(length)),
    ]
    model = build_model(split_config(parse_arguments(given)))
    initialise(model)
    write_open_clip(model.eval(), folder)


def _loop(job: dict[str, Any]) -> None:
    """Trains by open_clip's program; its locks stop gradients, and leave dropout as it is."""
    from open_clip.hf_model import HFTextEncoder
    from open_clip.timm_model import TimmModel
    from open_clip_train.main import main as train

    if job["eval_mode"]:
        for tower, part in ((TimmModel, "trunk"), (HFTextEncoder, "transformer")):
            _keep_in_eval_mode(tower, part)
    train(job["options"])


def _keep_in_eval_mode(tower: Any, part: str) -> None:
    switch = tower.train

    def train(self: Any, mode: bool = True) -> Any:
        switch(self, mode)
        getattr(self, part).eval()
        return self

    tower.train = train


def _judge(start: Path, checkpoint: Path, test: str) -> dict[str, float]:
    """Zero-shot top-1 and recalls, in percent, as `unicl-eval` prints them."""
    import safetensors.torch

    from unicl_fast import load_model
    from unicl_fast.conversion.torch_files import read_torch_file
    from unicl_fast.dataset.reader import PackedDataset
    from unicl_fast.evaluation.retrieval import retrieval
    from unicl_fast.evaluation.zero_shot import zero_shot

    trained = start.with_name("trained")
    shutil.copytree(start, trained)
    weights = read_torch_file(checkpoint, expected="a checkpoint of open_clip")
    safetensors.torch.save_file(weights, trained / WEIGHTS_FILE)
    config = trained / CONFIG_FILE
    described = config.read_text(encoding="utf-8").replace(str(start), str(trained))
    config.write_text(described, encoding="utf-8")
    model, scores = load_model(trained, device="cpu"), dict[str, float]()
    with PackedDataset(test) as dataset:
        has_labels, has_captions = dataset.manifest.num_labels, dataset.manifest.num_captions
    if has_labels:
        scores["top1"] = fmean(one.top1 for one in zero_shot(model, test).classes.values())
    if has_captions:
        found = retrieval(model, test).text_to_image
        scores |= {f"text finds image, R@{one.k}": one.rate for one in found}
    return {name: round(100 * rate, 2) for name, rate in scores.items()}


if __name__ == "__main__":
    main()
