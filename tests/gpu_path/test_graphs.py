"""DALI's graphs for a GPU, as far as they can be built without one: up to the driver.

DALI's schemas know each operator's devices and arguments. What they do not know is what comes out:
tests marked `gpu` compare images.
"""

import dataclasses

import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.backend import GetSchema
from nvidia.dali.pipeline import Pipeline

from unicl_fast.augmentation import parse_augmentation
from unicl_fast.config import DataConfig
from unicl_fast.pipelines.graph import build_evaluation_graph, build_train_graph
from unicl_fast.pipelines.kernels.operators import GraphParts, parts_for

pytestmark = pytest.mark.dali

GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _driver_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def no_inputs() -> tuple:
    raise StopIteration


def parts_of(augmentation: str) -> GraphParts | None:
    return parts_for([parse_augmentation(augmentation)], (0.5, 0.5, 0.5))


def devices_of(pipeline: Pipeline) -> dict[str, str]:
    """The operators of a graph and their devices; one that cannot work there is an error.

    That inputs lie where an operator takes them DALI has checked when it was called.
    """
    assert pipeline.device_id == 0
    pipeline._build_graph()
    found = {}
    for node in pipeline._ops:
        name, device = node._op._schema.Name(), node._op.device
        schema = GetSchema(name)  # raises for one that is not registered
        assert device in schema.GetSupportedBackends(), f"{name} does not run on {device}"
        schema.CheckArgs(node.spec)
        found[name] = device
    assert {output.device for output in pipeline._graph_out} == {"gpu"}
    return found


@pytest.mark.parametrize("augmentation", ["none", "clip", "unicl"])
@pytest.mark.parametrize("form", ["files", "pixels"])
def test_a_training_graph_is_one_that_dali_can_build(form, augmentation):
    found = devices_of(
        build_train_graph(
            no_inputs,
            data=DataConfig(augment=()),
            batch_size=8,
            device=GPU,
            form=form,
            augmentation=parts_of(augmentation),
        )
    )
    decoder = {"decoders__ImageSlice": "mixed"} if form == "files" else {"Slice": "gpu"}
    assert found.items() >= (decoder | {"ResizeCropMirror": "gpu"}).items()
    assert not {name for name in found if name.startswith("NumbaFunc")}  # ours runs on the CPU


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_evaluation_graph_is_one_that_dali_can_build(interpolation):
    data = dataclasses.replace(DataConfig(), interpolation=interpolation)
    pipeline = build_evaluation_graph(no_inputs, data=data, batch_size=8, device=GPU)
    found = devices_of(pipeline)
    assert found.items() >= {"decoders__Image": "mixed", "Resize": "gpu"}.items()


def test_an_output_on_the_host_is_seen():
    with Pipeline(batch_size=2, num_threads=1, device_id=0) as pipeline:
        (images,) = fn.external_source(no_inputs, num_outputs=1, batch=True)
        pipeline.set_outputs(fn.flip(images))
    with pytest.raises(AssertionError, match="cpu"):
        devices_of(pipeline)
