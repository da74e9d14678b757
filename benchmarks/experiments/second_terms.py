"""Second terms of the objective: a teacher whose features were stored once, and words.

Students are those of labels-and-captions, an image encoder from scratch that learns from labels and
captions at once. The teacher is a run of ours (photos-small: a fresh text encoder to ImageNet's
weights, locked, on the same data); `unicl-pack reinforce` stores what it makes of ten views of each
image, and students see those views, or draws of the same distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .first_weights import write_templates
from .harness import Run, mean_of, run_all, run_program
from .small_size import LabelsAndCaptions, pack

_TEACHING = {
    "alone": ("off",),
    "affinity": ("affinity", "--objective.distillation-weight", "0.5"),
    "affinity, 0.9": ("affinity", "--objective.distillation-weight", "0.9"),
    "features": ("features", "--objective.distillation-weight", "0.5"),
}
_SIZE, _CROPS = "64", ("0.4", "1.0")  # the teacher sees all pixels of a student's crop
_TEACHER_STEPS, _TEACHER_BATCH = 1200, 64
_WORDS = {
    f"batch {size}{', words' if weight else ''}": (size, weight)
    for size in (32, 256)
    for weight in (0, 1)
}


@dataclass(frozen=True, kw_only=True)
class Distillation(LabelsAndCaptions):
    """A student alone, and with a stored teacher by affinity or by features."""

    views: int = 10
    """Views of each image that the teacher sees."""

    def run(self) -> None:
        packed = self.out / "packed"
        # of ImageNet's 80 templates a teacher as short as this would learn little
        pack(self.data, packed, side=2 * int(_SIZE), templates=str(write_templates(packed)))
        teacher = self._teacher()
        of_teacher = run_all([teacher], self.out, jobs=1)
        for name in self.weights("both"):
            if not (packed / name / "teacher").exists():
                options = ["reinforce", str(packed / name), "--views", str(self.views)]
                options += ["--teacher", str(self.out / "teacher" / "run"), "--image-size", _SIZE]
                options += ["--crop-scale", *_CROPS, "--batch-size", "128"]
                run_program("pack", options, packed / f"{name}-teacher.log", threads=1)
        rows = self.train_arms(_TEACHING, self._student)
        cpu = {arm: round(mean_of([row["cpu_seconds"] for row in rows[arm]]).mean) for arm in rows}
        self.report(
            "distillation",
            {"teacher": [of_teacher["teacher"]], **rows},
            [(arm, "alone") for arm in _TEACHING if arm != "alone"],
            cpu_seconds=cpu,
        )

    def _teacher(self) -> Run:
        steps = max(2, round(self.length * _TEACHER_STEPS))
        student = self.make_run("both", 0)
        train = student.pretrain.index("--data.train")
        return replace(
            student,
            name="teacher",
            pretrain=(
                *("--preset", "photos-small", *student.pretrain[train : train + 4]),
                *("--run.samples", str(_TEACHER_BATCH * steps), "--optim.lr", "1.5e-3"),
                *("--run.global-batch-size", str(_TEACHER_BATCH), "--data.image-size", _SIZE),
                *("--data.evaluation-resize", _SIZE, "--run.evaluate-every-steps", "0"),
                *("--checkpoint.every-steps", "0", "--efficiency.precision", self.precision),
            ),
        )

    def _student(self, arm: str, seed: int) -> Run:
        options = ("--data.crop-scale", *_CROPS, "--objective.distillation", *_TEACHING[arm])
        return self.make_run("both", seed, f"distillation/{arm}", *options)


@dataclass(frozen=True, kw_only=True)
class Words(LabelsAndCaptions):
    """The words of a text as a second target of its image, at a small batch and a larger one."""

    def run(self) -> None:
        pack(self.data, self.out / "packed")
        rows = self.train_arms(
            _WORDS,
            lambda arm, seed: self.make_run(
                *("both", seed, f"words/{arm}"),
                *("--run.global-batch-size", str(_WORDS[arm][0])),
                *("--objective.words", str(_WORDS[arm][1])),
            ),
        )
        plain = [arm for arm, (_, weight) in _WORDS.items() if not weight]
        self.report("words", rows, [(f"{arm}, words", arm) for arm in plain])
