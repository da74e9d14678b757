"""A small student from scratch, alone and with a teacher whose features were stored once.

The teacher is a run of ours (photos-small: an image encoder with ImageNet's weights and a fresh
text encoder, on the same labels and captions); `unicl-pack reinforce` stores what it makes of ten
views of each image. Students (mixed-small) see those views, or draws of the same distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .harness import ExperimentSettings, Row, Run, mean_of, run_all, run_program, write_report
from .small_size import pack

_MIX = {"tiny-learnt": 0.5, "flickr-train": 0.5}
_ARMS = {
    "alone": ("off",),
    "affinity": ("affinity", "--objective.distillation-weight", "0.5"),
    "affinity, 0.9": ("affinity", "--objective.distillation-weight", "0.9"),
    "features": ("features", "--objective.distillation-weight", "0.5"),
}
_SIZE, _CROPS = "64", ("0.4", "1.0")  # the student's
_TEACHER_STEPS, _STUDENT_SAMPLES = 300, 40_000
_MEASURED = {
    "zero-shot top-1, 160 classes, new images": ("zero_shot", "tiny-learnt-new", "top1"),
    "zero-shot top-1, 40 classes never labelled": ("zero_shot", "tiny-held-back", "top1"),
    "caption finds its image, in 10 of 100": ("retrieval", "", "text_to_image_recall_at_10"),
}


@dataclass(frozen=True, kw_only=True)
class Distillation(ExperimentSettings):
    """A student alone, and with a stored teacher by affinity or by features."""

    data: Path
    """Folder with tiny-imagenet, captions/flickr8k and captions/coco."""
    views: int = 10
    """Views of each image that the teacher sees."""

    def run(self) -> None:
        packed = self.out / "packed"
        pack(self.data, packed, side=128)
        teacher = Run(name="teacher", pretrain=self._teacher(), evaluations=self._evaluations())
        of_teacher = run_all([teacher], self.out, jobs=1)["teacher"]
        for name in _MIX:
            if not (packed / name / "teacher").exists():
                options = ["reinforce", str(packed / name), "--views", str(self.views)]
                options += ["--teacher", str(self.out / "teacher" / "run"), "--image-size", _SIZE]
                options += ["--crop-scale", *_CROPS, "--batch-size", "128"]
                run_program("pack", options, packed / f"{name}-teacher.log", threads=1)
        rows = self.train_arms(_ARMS, self._make_run)
        cells = {
            title: {
                "teacher": mean_of([100 * _result(of_teacher, title)]),
                **{arm: mean_of([100 * _result(row, title) for row in rows[arm]]) for arm in _ARMS},
            }
            for title in _MEASURED
        }
        pairs = {
            f"{title}: {arm} - alone": (means[arm], means["alone"])
            for title, means in cells.items()
            for arm in _ARMS
            if arm != "alone"
        }
        cpu = {arm: round(mean_of([row["cpu_seconds"] for row in rows[arm]]).mean) for arm in _ARMS}
        table = self.table("mixed-small from scratch", cells, pairs)
        write_report("distillation", self, [table], rows, cpu_seconds=cpu)

    def _teacher(self) -> tuple[str, ...]:
        steps = max(2, round(self.length * _TEACHER_STEPS))
        return (
            *("--preset", "photos-small", "--run.samples", str(64 * steps), "--optim.lr", "1.5e-3"),
            *("--run.global-batch-size", "64", "--data.image-size", _SIZE),
            *("--optim.image-rate", "0.1", "--optim.unlock-at-step", str(steps // 2)),
            *("--data.evaluation-resize", _SIZE, *self._common()),
        )

    def _make_run(self, arm: str, seed: int) -> Run:
        samples = max(256, round(self.length * _STUDENT_SAMPLES))
        return Run(
            name=f"{arm}/seed{seed}".replace(" ", "").replace(",", "-"),
            pretrain=(
                *("--preset", "mixed-small", "--data.crop-scale", *_CROPS),
                *("--run.samples", str(samples), "--run.seed", str(seed)),
                *("--objective.distillation", *_ARMS[arm], *self._common()),
            ),
            execution=self.execution(),
            evaluations=self._evaluations(),
        )

    def _common(self) -> tuple[str, ...]:
        return (
            *("--data.train", *(f"{self.out / 'packed' / n}={w}" for n, w in _MIX.items())),
            *("--run.evaluate-every-steps", "0", "--checkpoint.every-steps", "0"),
            *("--efficiency.precision", self.precision),
        )

    def _evaluations(self) -> dict[str, tuple[str, ...]]:
        packed = self.out / "packed"
        sets = [str(packed / name) for name in ("tiny-learnt-new", "tiny-held-back")]
        return {
            "zero_shot": ("zero-shot", "--data", *sets),
            "retrieval": ("retrieval", "--data", str(packed / "flickr-new")),
        }


def _result(row: Row, title: str) -> float:
    evaluation, data_set, key = _MEASURED[title]
    found = row[evaluation]
    if data_set:
        found = next(one for one in found["data_sets"] if one["name"] == data_set)
    return float(found[key])
