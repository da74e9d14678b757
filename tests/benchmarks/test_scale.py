"""The model of a step on many GPUs: its bytes are the real step's, its limits are known by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import fake_ranks
from small_runs import labelled_batch, objective_config

from unicl_fast.benchmarks.run import main
from unicl_fast.benchmarks.scale.model import Compute, Nccl, binding, simulate
from unicl_fast.benchmarks.scale.run import Scale, model_rows, timed_config
from unicl_fast.benchmarks.scale.sizes import (
    Bucket,
    Collective,
    ModelSize,
    collectives,
    measure_size,
)
from unicl_fast.benchmarks.step.parts import build_trainer
from unicl_fast.presets import build_preset

GOLDEN = Path(__file__).parents[1] / "golden" / "collectives.json"
SIZE = ModelSize(
    image_operations=2e9,
    text_operations=1e9,
    embed_dim=512,
    before_texts=0.75,
    buckets=(
        Bucket(num_bytes=20_000_000, of_texts=False, ready=0.5),
        Bucket(num_bytes=100_000_000, of_texts=True, ready=1.0),
    ),
    buffers={},
)
COMPUTE = Compute.split(0.2, SIZE)
INFINITE = Nccl(
    link_gbit=math.inf,
    nvlink_gbyte=math.inf,
    start_us=0.0,
    nvlink_hop_us=0.0,
    network_hop_us=0.0,
)


def as_golden(sent: dict[str, Collective], buckets: tuple[Bucket, ...]) -> dict[str, Any]:
    """Calls and bytes under the names of torch's operators, as the golden table has them."""
    operators = {
        "all-gather": "allgather_base",
        "reduce-scatter": "reduce_scatter_base",
        "all-reduce": "allreduce",
        "broadcast": "broadcast",
    }
    found: dict[str, dict[str, int]] = {}

    def add(name: str, num_bytes: int) -> None:
        known = found.setdefault(name, {"calls": 0, "bytes": 0})
        known["calls"] += 1
        known["bytes"] += num_bytes

    for one in sent.values():
        dtype = str(one.dtype).removeprefix("torch.")
        add(f"device {operators[one.kind]} of {dtype}", one.num_bytes)
    for bucket in buckets:
        add("device all-reduce of gradients", bucket.num_bytes)
    return found


@pytest.mark.parametrize(
    ("key", "image_encoder", "world_size", "num_texts"),
    [
        *((f"{ranks} ranks/even", "test_vit", ranks, 5) for ranks in (8, 64, 1024)),
        *((f"{ranks} ranks/ragged", "test_vit", ranks, 9) for ranks in (8, 64, 1024)),
        ("64 ranks, BatchNorm", "unicl_convnet7_small", 64, 5),
    ],
)
def test_calls_and_bytes_are_those_of_the_golden_table(
    key: str, image_encoder: str, world_size: int, num_texts: int
) -> None:
    size = measure_size(objective_config("unicl", image_encoder=image_encoder, precision="fp32"))
    sent = collectives(
        world_size, num_texts=num_texts, embed_dim=size.embed_dim, buffers=size.buffers
    )
    golden = json.loads(GOLDEN.read_text())
    for part in key.split("/"):
        golden = golden[part]
    assert as_golden(sent, size.buckets) == golden["collectives"]


@pytest.mark.filterwarnings("ignore:.*is deprecated. Please use.*:FutureWarning")
def test_buckets_are_those_of_ddp() -> None:
    """Most of the images, the texts with their token embedding, the rest of the images."""
    config = objective_config("unicl", precision="fp32")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, text_width=160, text_layers=6),
        run=dataclasses.replace(config.run, global_batch_size=24),
    )
    batch = labelled_batch(torch.zeros(12, 32, 32, 3, dtype=torch.uint8), objective="unicl")
    found: list[int] = []

    def note(bucket: Any) -> torch.futures.Future[torch.Tensor]:
        found.append(bucket.buffer().nbytes)
        answer: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        answer.set_result(bucket.buffer())
        return answer

    with fake_ranks(2) as ranks:
        trainer, batch = build_trainer(config, batch, ranks=ranks)
        trainer.parallel.encode.register_comm_hook(None, lambda _, bucket: note(bucket))
        for _ in range(2):  # the first step orders them
            found.clear()
            trainer.back_propagate(batch)
    modelled = [bucket.num_bytes for bucket in measure_size(config).buckets]
    assert len(found) == 3
    assert found[2] < 1e6  # of images; the token embedding is not the last
    # a layer's weight and bias may come in either order
    assert modelled == pytest.approx(found, abs=1024)
    assert sum(modelled) == sum(found)


def step_seconds(compute: Compute = COMPUTE, *, ranks: int = 64, network: Any = INFINITE) -> float:
    return simulate(compute, SIZE, network, world_size=ranks, num_texts=512).seconds


def test_with_an_infinite_network_only_computing_is_left() -> None:
    assert step_seconds(ranks=1024) == pytest.approx(COMPUTE.total)
    assert step_seconds(ranks=1, network=Nccl(link_gbit=100)) == pytest.approx(COMPUTE.total)


@dataclasses.dataclass(frozen=True)
class GradientsOnly:
    """A network in which gradients take a second for each 10 MB, and all else no time."""

    def latency(self, collective: Collective, world_size: int) -> float:
        return 0.0

    def transfer(self, collective: Collective, world_size: int) -> float:
        known = {bucket.num_bytes for bucket in SIZE.buckets}
        return collective.num_bytes / 1e7 if collective.num_bytes in known else 0.0


def test_texts_hide_behind_the_rest_of_the_images() -> None:
    compute = Compute(
        text_forward=1.0, image_forward=1.0, loss=1.0, image_backward=4.0, text_backward=1.0,
        update=1.0,
    )  # fmt: skip
    step = simulate(compute, SIZE, GradientsOnly(), world_size=4, num_texts=3)
    # the images' is sent at 5 and there at 7; the texts' is ready at 7 and takes 10 seconds, of
    # which the last second of the images hides one
    assert step.seconds == pytest.approx(7 + 10 + 1)
    assert step.waits["gradients"] == pytest.approx(9)
    assert binding(step, compute=9, loss_growth=0) == "gradients, last bucket"
    slow_first = dataclasses.replace(compute, image_backward=0.0, text_backward=0.0)
    step = simulate(slow_first, SIZE, GradientsOnly(), world_size=4, num_texts=3)
    assert step.seconds == pytest.approx(4 + 2 + 10)


def test_rings_send_what_is_known_of_them() -> None:
    all_reduce = Collective(kind="all-reduce", num_bytes=4_000_000)
    scatter = Collective(kind="reduce-scatter", num_bytes=4_000_000)
    nccl = Nccl(link_gbit=800, achieved=1.0, nvlink_gbyte=200)
    assert nccl.transfer(all_reduce, 8) == pytest.approx(2 * 4e6 * 7 / 8 / 200e9)
    assert nccl.transfer(all_reduce, 16) == pytest.approx(2 * 4e6 * 15 / 16 / 100e9)
    assert nccl.transfer(scatter, 16) == pytest.approx(nccl.transfer(all_reduce, 16) / 2)


def test_the_loss_grows_by_four_products_of_the_added_texts() -> None:
    grown = COMPUTE.on_ranks(8, SIZE, local_batch=512)
    rate = SIZE.step_operations(512, 512) / 0.2
    assert grown.total - COMPUTE.total == pytest.approx(4 * 2 * 512 * 7 * 512 * 512 / rate)


def test_the_host_binds_where_steps_are_shorter_than_their_launching() -> None:
    short, network = Compute.split(0.02, SIZE), Nccl(link_gbit=math.inf)
    step = simulate(short, SIZE, network, world_size=1024, num_texts=64, host_seconds=0.1)
    assert step.seconds == pytest.approx(0.1)
    assert binding(step, compute=short.total, loss_growth=0) == "host"


def test_efficiency_is_1_at_one_machine_and_falls_from_there() -> None:
    rows = model_rows([8, 64, 512], [100, 3200], SIZE, COMPUTE, local_batch=512, host_seconds=0.0)
    for slow, fast in zip(rows[:3], rows[3:], strict=True):
        assert slow["efficiency"] <= fast["efficiency"] <= 1
        assert slow["rate"] == pytest.approx(slow["gpus"] * 512 / slow["seconds"])
    assert rows[0]["efficiency"] == rows[3]["efficiency"] == 1
    assert rows[2]["efficiency"] < rows[1]["efficiency"] < 1


def test_a_larger_batch_takes_longer_but_for_the_update() -> None:
    step = Compute(text_forward=1, image_forward=2, loss=3, image_backward=4, text_backward=5,
                   update=6)  # fmt: skip
    larger = step.enlarged(SIZE, batch=8, local_batch=16)
    rate = SIZE.step_operations(8, 8) / step.total
    assert larger == dataclasses.replace(
        step, text_forward=2, image_forward=4, image_backward=8, text_backward=10,
        loss=3 + 4 * 2 * (16 * 16 - 8 * 8) * 512 / rate,
    )  # fmt: skip
    assert step.enlarged(SIZE, batch=8, local_batch=8) == step


@pytest.mark.parametrize(("free", "smallest", "largest"), [(64e9, 2, 64), (0.5e9, 0, 0)])
def test_a_step_that_is_timed_fits_into_memory(
    monkeypatch: pytest.MonkeyPatch, free: float, smallest: int, largest: int
) -> None:
    """The default is Swin-T in batches of 512, which take 16 GB."""
    monkeypatch.setattr("unicl_fast.benchmarks.scale.run.free_memory", lambda device: free)
    config = build_preset(Scale().preset)
    if not largest:
        with pytest.raises(ValueError, match=r"one image takes .* GB, and 0.5 are free .*--step-s"):
            timed_config(config, torch.device("cpu"), local_batch=512)
        return
    timed = timed_config(config, torch.device("cpu"), local_batch=512)
    assert smallest <= timed.run.global_batch_size <= largest


@pytest.mark.parametrize("count", ["0", "-8", "20"])
def test_gpus_that_fill_no_machines_are_refused(
    count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["scale", "--preset", "digits-small", "--step-seconds", "1", "--gpus", "8", count])
    assert f"--gpus: {count} GPUs do not fill machines of 8" in capsys.readouterr().err


def test_a_step_is_timed_where_none_is_stated(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--preset", "digits-small", "--local-batch", "2", "--rounds", "1", "--gpus", "8")
    main(["scale", *options])
    assert re.search(r"MODEL, not measured: .* ms a step: timed here", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["scale", *options, "--step-seconds", "-1"])
    assert "--step-seconds must be at least 0" in capsys.readouterr().err
