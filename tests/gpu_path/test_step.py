"""The trainer's step on a GPU that is not there: no host read, no crossing, and a budget.

tests/golden/gpu_step.json has what each step launches and how many bytes it moves;
UNICL_WRITE_BUDGETS=1 writes it anew. Operators are counted, not kernels of a device; both are what
an eager step costs beside its arithmetic.
"""

import ctypes
import traceback
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from budgets import compare
from fake_gpu import GPU, FakeEvent, HostWaitsError, Kernels, fake_gpu, fake_trainer
from small_runs import OBJECTIVES as ALL_OBJECTIVES
from small_runs import labelled_batch, objective_config

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.config import TrainConfig
from unicl_fast.models import compilation
from unicl_fast.objectives.targets import collate
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training.assembly import make_trainer
from unicl_fast.training.trainer import Trainer

VERSIONS = {"torch": torch.__version__.split("+")[0], "timm": timm.__version__}

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
slow = pytest.mark.slow
OBJECTIVES = ["unicl", "clip", "ce"]
# What makes a step another one, by the name of its budget: objective, precision, settings.
STEPS = [
    pytest.param("unicl", "bf16", {}, id="unicl bf16"),
    pytest.param("ce", "fp32", {}, id="ce fp32"),
    pytest.param(
        *("unicl", "fp16", {"micro_batch_size": 6, "activation_checkpointing": True}),
        id="unicl fp16 micro-batches checkpointing",
    ),
    *(
        pytest.param(objective, precision, {}, id=f"{objective} {precision}", marks=slow)
        for objective in OBJECTIVES
        for precision in ("fp32", "bf16", "fp16")
        if (objective, precision) not in (("unicl", "bf16"), ("ce", "fp32"))
    ),
    *(
        pytest.param("unicl", "bf16", settings, id=f"unicl bf16 {name}", marks=slow)
        for name, settings in {
            "checkpointing": {"activation_checkpointing": True},
            "micro-batches": {"micro_batch_size": 6},
            "tiled": {"loss": "tiled"},
            "convnet": {"image_encoder": "unicl_convnet7_small", "max_bad_steps": 3},
        }.items()
    ),
]


def config_of(objective: str, precision: str, settings: dict) -> TrainConfig:
    settings = dict(settings)
    max_bad_steps = settings.pop("max_bad_steps", 0)
    config = objective_config(objective, precision=precision, **settings)
    return config.changed(run={"max_bad_steps": max_bad_steps})


def tiny_batch(objective: str = "unicl") -> Batch:
    images = torch.zeros(12, 32, 32, 3, dtype=torch.uint8)
    return labelled_batch(images, objective=objective)


def photographs(count: int, side: int) -> Batch:
    """Images with captions of nine to twenty tokens, all distinct."""
    texts = [f"a photo of number {i}, " + "very " * (i % 12) + "large" for i in range(count)]
    labels = torch.full((count,), -1)
    images = torch.zeros(count, side, side, 3, dtype=torch.uint8)
    return collate(images, Tokenizer()(texts), labels)


def second_step(trainer: Trainer, batch: Batch) -> Kernels:
    """The kernels of a step after the first, which makes the optimizer's state and what is kept."""
    with Kernels(may_wait=True):
        trainer.train_step(batch.to(GPU))
    with Kernels() as kernels:
        trainer.train_step(batch.to(GPU))
    return kernels


def check_budget(name: str, kernels: Kernels, *, images: int = 0) -> None:
    figures = {"launches": kernels.launches.total(), "bytes": kernels.num_bytes}
    if images:
        figures["images/s by the roofline of an H100"] = round(images / kernels.seconds)
    compare("gpu_step.json", name, figures | kernels.copies_to_device, versions=VERSIONS)


@pytest.mark.parametrize(("objective", "precision", "settings"), STEPS)
def test_a_step_never_waits_and_stays_in_its_budget(
    stand_in, request, objective, precision, settings
):
    config, batch = config_of(objective, precision, settings), tiny_batch(objective)
    with fake_gpu(stand_in) as mode:
        kernels = second_step(*fake_trainer(mode, config, batch))
    check_budget(request.node.callspec.id, kernels)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(name, marks=[] if name.endswith("labels") else slow)
        for name in sorted({*ALL_OBJECTIVES} - {*OBJECTIVES})
    ],
)
def test_steps_of_other_objectives_never_wait(stand_in, objective):
    config, batch = config_of(objective, "bf16", {}), tiny_batch(objective)
    with fake_gpu(stand_in) as mode:
        second_step(*fake_trainer(mode, config, batch))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("bf16", {}),
        ("fp16", {}),
        ("bf16", {"loss": "tiled"}),
        ("bf16", {"loss": "triton"}),
        ("bf16", {"micro_batch_size": 5}),
    ],
)
def test_a_step_on_a_gpu_never_waits_for_it(precision, settings):
    """CUDA itself tells: any wait of the host in the step is an error."""
    config = config_of("unicl", precision, settings).changed(run={"device": "cuda"})
    trainer = make_trainer(config, ListLoader([tiny_batch()]), progress=False)
    assert trainer.device.type == "cuda"
    batches = trainer.loader.batches(0)
    for _ in range(2):  # kernels are chosen and memory is taken
        trainer.train_step(next(batches).to(trainer.device))
    batch = next(batches).to(trainer.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@slow
@pytest.mark.parametrize(
    ("preset", "attention"),
    [
        ("swin-tiny", "triton"),
        *(
            pytest.param(preset, "timm", marks=pytest.mark.long)
            for preset in ("swin-tiny", "resnet50", "vit-base", "focalnet-base")
        ),
    ],
)
def test_the_step_of_a_preset_stays_in_its_budget(stand_in, preset, attention, monkeypatch):
    """512 photographs of 224 x 224 in bf16: the released recipe on eight GPUs."""
    if attention == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(compilation, "obstacle_to_triton", lambda index, oldest: "")
    config = build_preset(preset).changed(
        efficiency={"precision": "bf16", "compile": "off", "window_attention": attention},
        run={"global_batch_size": 512, "steps": 10},
    )
    batch = photographs(512, 224)
    with fake_gpu(stand_in) as mode:
        kernels = second_step(*fake_trainer(mode, config, batch))
    name = preset if attention == "timm" else f"{preset}, window attention in Triton"
    check_budget(name, kernels, images=512)


SCORES = [(8, 1, 8, 8), (12, 2, 5, 5), (48, 3, 16, 16), (12, 6, 16, 16)]
"""Of texts, of a small ViT and of both stages of a small Swin: rows, heads, tokens twice."""


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=slow)])
@pytest.mark.parametrize(
    ("image_encoder", "attention", "expected"),
    [
        pytest.param("test_vit", "timm", set(), marks=slow),
        ("unicl_swin6_small", "timm", {(48, 3, 16, 16), (12, 6, 16, 16)}),
        ("unicl_swin6_small", "triton", set()),
    ],
)
def test_no_tower_stores_scores(
    stand_in, monkeypatch, precision, image_encoder, attention, expected
):
    """Neither that of texts, nor those of images but for timm's windows, in which they are seen."""
    if attention == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(compilation, "obstacle_to_triton", lambda index, oldest: "")
        from unicl_fast.models import window_attention

        # sums of the bias' gradients have the shape of scores where a program has one window
        monkeypatch.setattr(window_attention, "PROGRAMS", 1)
    settings = {"image_encoder": image_encoder, "window_attention": attention, "compile": "off"}
    config, batch = config_of("unicl", precision, settings), tiny_batch()
    config = config.changed(model={"text_heads": 1})
    with fake_gpu(stand_in) as mode:
        kernels = second_step(*fake_trainer(mode, config, batch))
    assert kernels.shapes & {*SCORES} == expected


def test_a_run_reads_nothing_until_the_step_after_a_logging_step_is_launched(stand_in, monkeypatch):
    def wait(event: FakeEvent) -> None:
        raise HostWaitsError("the host waits for an event")

    monkeypatch.setattr(FakeEvent, "synchronize", wait)
    config = config_of("unicl", "bf16", {})
    config = config.changed(run={"log_every_steps": 3}, checkpoint={"every_steps": 0})
    batch = tiny_batch()
    with fake_gpu(stand_in) as mode:
        trainer, batch = fake_trainer(mode, config, batch)
        with Kernels(may_wait=True):
            trainer.train_step(batch.to(GPU))
        trainer.loader, trainer.step = ListLoader([batch]), 0
        with Kernels(), pytest.raises(HostWaitsError, match="waits for an event") as caught:
            trainer.fit()
    assert trainer.step == 4
    assert "_write_line" in [frame.name for frame in traceback.extract_tb(caught.tb)]


@pytest.fixture
def warm(stand_in: ctypes.CDLL) -> Iterator[tuple[Trainer, Batch]]:
    config, batch = config_of("ce", "fp32", {}), tiny_batch("ce")
    with fake_gpu(stand_in) as mode:
        trainer, batch = fake_trainer(mode, config, batch)
        with Kernels(may_wait=True):
            trainer.train_step(batch.to(GPU))
            on_gpu = batch.to(GPU)
        yield trainer, on_gpu


READS = {
    "item": lambda images: images.sum().item(),
    "float": lambda images: float(images.sum()),
    "bool": lambda images: bool(images.sum() > 0),
    "tolist": lambda images: images[0, 0, 0].tolist(),
    "nonzero": lambda images: images.nonzero(),
    "mask": lambda images: images[images > 0],
    "unique": lambda images: images.unique(),
    "cpu": lambda images: images.cpu(),
    "into the host": lambda images: torch.empty_like(images, device="cpu").copy_(images),
    "from the host": lambda images: torch.tensor([1.0, 2.0], device=images.device),
    "to": lambda images: torch.ones(3).to(images.device),
}


def test_what_makes_the_host_wait_is_seen(warm):
    trainer, batch = warm
    seen = []
    for name, read in READS.items():

        def hook(module: object, inputs: tuple, read: Callable = read) -> None:
            read(inputs[0])

        with trainer.model.image_encoder.register_forward_pre_hook(hook), Kernels():
            try:
                trainer.train_step(batch)
            except HostWaitsError:
                seen.append(name)
    assert seen == list(READS)


def test_more_launches_and_bytes_are_seen(warm, monkeypatch):
    monkeypatch.delenv("UNICL_WRITE_BUDGETS", raising=False)
    trainer, batch = warm
    with Kernels() as plain:
        trainer.train_step(batch)
    double = trainer.model.image_encoder.register_forward_hook(lambda *given: 2 * given[2])
    with double, Kernels() as more:
        trainer.train_step(batch)
    assert more.launches - plain.launches == {"mul": 2}  # forward and backward
    assert more.num_bytes - plain.num_bytes == 4 * 12 * 64 * 4  # features are read and written
    with pytest.raises(AssertionError, match="launches rose from"):
        check_budget("ce fp32", more)
