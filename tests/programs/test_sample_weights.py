"""Runs on samples with weights: what these multiply, and what they leave alone."""

import csv
import shutil
from pathlib import Path

import pytest
from compared_runs import losses_of
from drawings import COLOURS, draw
from inline_checks import check_inline
from pack_runs import build_set
from program_runs import SMALL, call, refusal_of, weights

from unicl_fast.tools import ledger, pretrain

pytestmark = pytest.mark.dali
GIVEN = [
    *(*SMALL, "--efficiency.precision", "fp64", "--run.trackers", "--ledger"),
    *("--data.crop-scale", "1", "1", "--data.crop-ratio", "1", "1"),
    *("--data.flip-probability", "0", "--run.steps", "6"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 drawings with captions and labels, without weights, with equal and with uneven ones."""
    folder = tmp_path_factory.mktemp("packed")
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption", "label", "three", "uneven"])
        for number in range(40):
            image, colour, shape = draw(number, side=32)
            (folder / f"{number}.png").write_bytes(image)
            uneven = 9 if colour == COLOURS[0] else 0.5
            rows.writerow([f"{number}.png", f"{shape} in {colour}", colour, 3, uneven])
    with pytest.MonkeyPatch.context() as patch:
        check_inline(patch)
        for column in ("", "three", "uneven"):
            build_set([folder / "list.csv"], folder / (column or "none"), weight_column=column)
    return folder


def train(out: Path, *data: Path, use: str, more: tuple[str | Path, ...] = ()) -> list[float]:
    given = ["--data.train", *map(str, data), "--data.sample-weights", use]
    call(pretrain, *GIVEN, *given, *more, "--out", out)
    return losses_of(out)


@pytest.mark.slow
def test_equal_weights_change_no_bit_and_others_each_what_was_asked_for(packed, tmp_path, capsys):
    plain = train(tmp_path / "plain", packed / "none", use="none")
    for use in ("loss", "draws"):
        assert train(tmp_path / f"equal-{use}", packed / "three", use=use) == plain
        assert weights(tmp_path / f"equal-{use}") == weights(tmp_path / "plain")
    assert train(tmp_path / "unused", packed / "uneven", use="none") == plain
    found, both = {}, (packed / "uneven", packed / "none")
    for use in ("loss", "draws"):
        out = tmp_path / use
        found[use] = train(out, *both, use=use)
        whole = weights(out)
        shutil.rmtree(out / "checkpoints" / "step-00000006")
        train(out, *both, use=use, more=("--resume", "auto"))
        assert (losses_of(out), weights(out)) == (found[use], whole)
        with pytest.raises(SystemExit) as proven:
            call(ledger, out, "--replan")
        assert proven.value.code == 0
        assert ("as often as its weight says" in capsys.readouterr().out) == (use == "draws")
        for path in (out / "ledger").glob("weights-*.npy"):
            path.write_bytes(path.read_bytes()[:-1] + b"!")
            assert "is damaged" in refusal_of(ledger, out)
        locked = ("--optim.freeze", "image", "text")
        features = (*locked, "--efficiency.stored-features", tmp_path / "features")
        encoded = train(tmp_path / f"{use}-encoded", *both, use=use, more=locked)
        stored = train(tmp_path / f"{use}-stored", *both, use=use, more=features)
        assert stored == pytest.approx(encoded, rel=1e-9)
    found["none"] = train(tmp_path / "none", *both, use="none")
    assert len(set(map(tuple, found.values()))) == 3


def test_what_cannot_be_weighted_is_refused_before_training(packed, tmp_path):
    for data, more, message in (
        ("none", (), "data.sample_weights=loss: data.train has no weights"),
        ("uneven", ("--objective.name", "ce"), "the loss of objective.name=ce takes no weights"),
        ("uneven", ("--objective.name", "siglip"), "objective.name=siglip takes no weights"),
    ):
        given = ["--data.train", packed / data, "--data.sample-weights", "loss", *more]
        assert message in refusal_of(pretrain, *GIVEN, *given, "--out", tmp_path / "run")
