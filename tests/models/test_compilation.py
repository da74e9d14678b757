"""Compiled blocks: the eager step's result, and no new graph for each batch."""

import copy
import functools
import importlib.util
import inspect
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compared_runs import assert_same_gradients
from rank_workers import first_gradients
from small_runs import StepLoader, tiny_config
from torch._dynamo.utils import counters

from unicl_fast.batch import Batch, ListLoader
from unicl_fast.checkpoints.load import build_model
from unicl_fast.config import EfficiencyConfig
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.features import encode_images, encode_token_rows
from unicl_fast.models import compilation, image_encoder, small, text_encoder
from unicl_fast.models.compilation import (
    compile_blocks,
    has_compiler,
    round_up_count,
    round_up_length,
    rounds_sizes,
    settle_compilation,
)
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.targets import collate
from unicl_fast.presets import build_preset
from unicl_fast.text.tokenizer import Tokenizer
from unicl_fast.training import block_trial
from unicl_fast.training import parallel as parallel_module
from unicl_fast.training.assembly import make_trainer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
CLOSE = {"of_loss": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _encoders_as_users_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checks of shapes around their functions, which torch would trace too."""
    modules = (text_encoder, image_encoder, small)
    found = [one for module in modules for one in vars(module).values() if inspect.isclass(one)]
    for cls in (one for one in found if one.__module__.startswith("unicl_fast.models.")):
        for name, function in list(vars(cls).items()):
            if inspect.isfunction(function):
                monkeypatch.setattr(cls, name, inspect.unwrap(function))
            elif isinstance(function, classmethod):
                monkeypatch.setattr(cls, name, classmethod(inspect.unwrap(function.__func__)))


@pytest.fixture
def compile_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has steps compile by another backend: how often is the tracer's business."""

    def use(backend: str) -> None:
        by_backend = functools.partial(compile_blocks, backend=backend)
        monkeypatch.setattr(parallel_module, "compile_blocks", by_backend)

    return use


def batch_of_texts(images: torch.Tensor, *, num_texts: int, num_words: int, step: int) -> Batch:
    texts = [f"number {i % num_texts} " + "dog " * num_words for i in range(12)]
    labels = torch.full((12,), -1)
    return collate(images, Tokenizer()(texts), labels, step=step)


def test_sizes_are_few_and_not_much_larger():
    assert [round_up_length(length) for length in (1, 8, 9, 77)] == [8, 8, 16, 80]
    for count in range(1, 5000):
        rounded = round_up_count(count)
        assert count <= rounded <= max(8, 1.25 * count + 8)
        assert rounded % 8 == 0
        assert round_up_count(rounded) == rounded
    assert len({round_up_count(count) for count in range(1, 4097)}) <= 8 + 6 * 4


@pytest.mark.parametrize(
    "others", [{}, {"micro_batch_size": 5}], ids=lambda others: ",".join(others) or "default"
)
def test_padded_texts_do_not_count(images, others, monkeypatch):
    """The sizes of a compiled step, without compiling."""
    plain = first_gradients(images, Ranks(), tiny_config())
    monkeypatch.setattr(parallel_module, "compile_blocks", lambda model: None)
    config = tiny_config(compile="blocks", **others)
    assert_same_gradients(first_gradients(images, Ranks(), config), plain, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "drop_path"),
    [
        ("unicl_convnet7_small", 0.0),  # torch skips the forward of an nn.Sequential
        ("unicl_swin6_small", 0.2),
        ("focalnet_base_srf", 0.2),
        ("resnet50", 0.0),
    ],
)
def test_image_blocks_have_no_breaks(encoder, drop_path):
    changes = {"image_encoder": encoder, "drop_path": drop_path}
    config = build_preset("mixed-small").changed(model=changes)
    model, side = build_model(config), config.data.image_size
    compile_blocks(model, backend="eager")
    model.set_drop_path_key(step=0, global_index=torch.arange(2))
    model.image_encoder(torch.zeros(2, 3, side, side))
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]


ALIKE = [(12, 8), (11, 9), (10, 10), (12, 7), (9, 11)]
DIFFERENT = [
    *[(12, 3), (7, 20), (12, 9), (3, 40), (9, 1)],
    *[(1, 60), (12, 30), (5, 5), (10, 14), (2, 2)],
]


@pytest.mark.parametrize(
    ("sizes", "most"), [(ALIKE, 3), pytest.param(DIFFERENT, 6, marks=pytest.mark.slow)]
)
def test_new_lengths_and_numbers_of_texts_do_not_compile_anew(images, sizes, most, compile_by):
    """Nor do other branches that are dropped; equal blocks of a kind are one graph."""
    compile_by("eager")
    batches = [
        batch_of_texts(images, num_texts=texts, num_words=words, step=step)
        for step, (texts, words) in enumerate(sizes)
    ]
    trainer = make_trainer(tiny_config(compile="blocks"), ListLoader(batches), progress=False)
    graphs = []
    for batch in batches:
        trainer.train_step(batch)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 3  # image blocks with and without drop path, and text blocks
    assert graphs[-1] <= most, graphs
    assert graphs[3:] == [graphs[-1]] * (len(graphs) - 3), graphs
    assert not counters["graph_break"]
    if sizes == ALIKE:
        return
    encode_in_many_sizes(trainer.model.eval(), images)
    graphs.append(counters["stats"]["unique_graphs"])
    encode_in_many_sizes(trainer.model, images)
    assert counters["stats"]["unique_graphs"] == graphs[-1] <= 3 * most
    assert not counters["graph_break"]


def encode_in_many_sizes(model: UniCL, images: torch.Tensor) -> None:
    """As evaluation does: without gradients, in other batches, the last of one."""
    for count in (12, 5, 7, 3, 1):
        encode_images(model, images[:count])
        encode_token_rows(model, [np.arange(1, 4 + count, dtype=np.uint16)] * count)


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [
        {"activation_checkpointing": True, "micro_batch_size": 5},
        pytest.param({"image_encoder": "resnet18"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_compiled_blocks_give_the_eager_gradients(images, others, compile_by):
    """With torch's own kernels, by way of the forward and backward graphs of a compiled step.

    A Swin's are executed in gpu_path/test_compiled_blocks.py.
    """
    eager = first_gradients(images, Ranks(), tiny_config(**others))
    compile_by("aot_eager")
    found = first_gradients(images, Ranks(), tiny_config(compile="blocks", **others))
    assert counters["stats"]["unique_graphs"] >= 3
    assert not counters["graph_break"]
    assert_same_gradients(found, eager, **CLOSE)


@pytest.mark.slow
def test_compiled_blocks_with_adapters_are_few_graphs_of_the_same_gradients(images, compile_by):
    config = tiny_config().changed(optim={"lora": "image:4,text:2"})
    loss, eager = first_gradients(images, Ranks(), config)
    # A has a gradient once B, which starts at 0, has moved
    eager = {name: one for name, one in eager.items() if one is not None and "lora_A" not in name}
    compile_by("aot_eager")
    compiled = config.changed(efficiency={"compile": "blocks"})
    found, gradients = first_gradients(images, Ranks(), compiled)
    found = found, {name: gradients[name] for name in eager}
    assert_same_gradients(found, (loss, eager), **CLOSE)
    assert not counters["graph_break"]
    # one more than without adapters: what comes into the first blocks takes no gradient
    assert counters["stats"]["unique_graphs"] <= 4


def test_what_is_compiled_keeps_names_and_leaves_copies_as_they_were(images):
    config = tiny_config(compile="blocks")
    plain = build_model(config).state_dict().keys()
    trainer = make_trainer(config, StepLoader(images), progress=False)

    def num_compiled(model: torch.nn.Module) -> int:
        return sum(module._compiled_call_impl is not None for module in model.modules())

    assert num_compiled(trainer.model) == 6 + 2
    assert num_compiled(copy.deepcopy(trainer.model)) == 0
    assert trainer.model.state_dict().keys() == plain


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler; none found")
def test_the_compiled_step_is_the_eager_step(images):
    """By torch's own kernels, compiled."""

    def trained(**efficiency: object) -> tuple[list[float], dict[str, torch.Tensor]]:
        # test_compiled_blocks_give_the_eager_gradients has drop path; Inductor takes half a minute
        config = tiny_config(steps=3, **efficiency).changed(model={"drop_path": 0.0})
        trainer = make_trainer(config, StepLoader(images), progress=False)
        batches = trainer.loader.batches(0)
        losses = [trainer.train_step(next(batches))[0].item() for _ in range(3)]
        return losses, trainer.model.state_dict()

    eager_losses, eager = trained()
    losses, weights = trained(compile="blocks")
    assert counters["stats"]["unique_graphs"] >= 2
    assert losses == pytest.approx(eager_losses, rel=1e-10)
    assert weights.keys() == eager.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, eager[name], rtol=1e-7, atol=1e-9, msg=name)


def try_blocks(monkeypatch: pytest.MonkeyPatch, backend: Any, **settings: Any) -> None:
    """The trial of `auto` for a small model in bf16, here."""
    compile_here = functools.partial(compile_blocks, backend=backend)
    monkeypatch.setattr(block_trial, "compile_blocks", compile_here)
    monkeypatch.setattr(
        compilation, "fault_in_trial", lambda _, *given: block_trial.try_out(*given)
    )
    config = tiny_config(precision="bf16", **settings)
    compilation._fault_of_blocks(config, torch.device("cpu"))


@pytest.mark.long
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler; none found")
def test_sound_blocks_pass_their_trial_by_inductor(monkeypatch):
    try_blocks(monkeypatch, "inductor")


OFF_BY_5_PERCENT = {
    "the value of Block": lambda result: 1.05 * result,
    "the gradient of its input of Block": lambda result: result + 0.05 * (result - result.detach()),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", OFF_BY_5_PERCENT)
def test_a_compiled_block_that_is_off_by_5_percent_fails_its_trial(monkeypatch, what):
    def backend(graph: Callable[..., Any], _: object) -> Callable[..., Any]:
        return lambda *inputs: [OFF_BY_5_PERCENT[what](result) for result in graph(*inputs)]

    with pytest.raises(ArithmeticError, match=f"{what}.*is off by 5.*e-02"):
        try_blocks(monkeypatch, backend)


@pytest.mark.slow
def test_each_kind_of_block_is_tried_once(monkeypatch):
    """Windows shifted and not, of both stages, and of texts; equal blocks are one."""
    kinds = []
    monkeypatch.setattr(block_trial, "check_close", lambda *_, what, **__: kinds.append(what))
    # nothing is traced: what a compiled block computes is looked at above
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, backend: None)
    try_blocks(monkeypatch, "eager", image_encoder="unicl_swin6_small")
    names = [what.split()[3] for what in kinds if what.startswith("the value")]
    assert set(names) == {"SwinTransformerBlock", "TextBlock"}
    assert names.count("TextBlock") == 1 < names.count("SwinTransformerBlock") < 6


def test_what_cannot_be_compiled_is_refused(tmp_path, monkeypatch):
    norms = {"image_encoder": "unicl_convnet7_small", "activation_checkpointing": True}
    for settings, message in (
        (norms, "BatchNorm.*activation_checkpointing=False"),
        ({"image_encoder": "test_nfnet"}, "NormFreeNet has none.*compile=off"),
    ):
        with pytest.raises(ValueError, match=message):
            compile_blocks(build_model(tiny_config(**settings)), backend="eager")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler.*efficiency.compile=off"):
        compile_blocks(build_model(tiny_config()))


def settled(model: UniCL, device: str) -> str:
    return settle_compilation(EfficiencyConfig(precision="fp64"), model, torch.device(device))


def test_auto_compiles_blocks_on_a_gpu_where_all_ranks_can(monkeypatch, caplog):
    model = build_model(tiny_config())
    capability = (8, 0)
    found = {"g++", "gcc", "triton"}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(compilation, "has_compiler", lambda: "g++" in found)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in found or None)
    fault = ""
    monkeypatch.setattr(compilation, "fault_in_trial", lambda *_: fault)
    assert (settled(model, "cpu"), settled(model, "cuda")) == ("off", "blocks")
    for missing in ("g++", "gcc", "triton"):
        found.remove(missing)
        assert settled(model, "cuda") == "off"
        found.add(missing)
    with monkeypatch.context() as without_headers:  # Triton would fail at the first step
        without_headers.setattr(sysconfig, "get_path", lambda *_: "/nowhere")
        assert settled(model, "cuda") == "off"
        assert "python3-dev" in compilation._obstacle_to_blocks(model, torch.device("cuda"))
    fault = "block_trial fp64: the value of Block is off by 5.0e-02 of its norm"
    assert settled(model, "cuda") == "off"
    assert [one.levelname for one in caplog.records if fault in one.message] == ["WARNING"]
    fault, capability = "", (6, 1)
    assert settled(model, "cuda") == "off"
    capability = (7, 0)
    assert settled(build_model(tiny_config(image_encoder="test_nfnet")), "cuda") == "off"
    norms = {"image_encoder": "unicl_convnet7_small", "activation_checkpointing": True}
    assert settled(build_model(tiny_config(**norms)), "cuda") == "off"
    monkeypatch.setattr(compilation, "gather_integers", lambda value, ranks: [value, 1])
    everyone = [["", ""], ["no C++ compiler is found", ""]]
    monkeypatch.setattr(compilation, "gather_objects", lambda value, ranks: everyone)
    assert settled(model, "cuda") == "off"


def test_sizes_of_texts_are_rounded_where_that_helps():
    cases = [("auto", "cpu"), ("off", "cpu"), ("blocks", "cpu"), ("off", "cuda")]
    rounded = [
        rounds_sizes(tiny_config(compile=what).efficiency, torch.device(on)) for what, on in cases
    ]
    assert rounded == [False, False, True, True]
