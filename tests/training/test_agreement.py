"""Ranks that do not run the same thing are found, and said by what differs."""

import copy

import pytest
from rank_workers import disagree, run_on_ranks, train_with_a_parted_weight
from small_runs import tiny_config

from unicl_fast.config_json import config_to_dict
from unicl_fast.training.agreement import describe_rank, source_files

DATA = {"sources": [{"num_samples": 12, "shards": ["abc"]}], "shares": None}


def test_what_differs_is_named_with_its_rank():
    same = describe_rank(config_to_dict(tiny_config()), DATA)
    changes = {
        "run.seed is 0 on rank 0 and 7 on rank 1": ("run", "seed", 7),
        "optim.lr is 0.001 on rank 0 and 0.002 on rank 1": ("optim", "lr", 0.002),
        "contents of data.sources[0].shards[0] is 'abc' on rank 0 and 'abd' on rank 1": (
            *("contents of data", "sources"),
            [{"num_samples": 12, "shards": ["abd"]}],
        ),
        "version of.torch is ": ("version of", "torch", "0"),
        "code is ": ("code", "0"),
    }
    descriptions = []
    for path in changes.values():
        *groups, name, value = path
        descriptions.append(copy.deepcopy(same))
        inner = descriptions[-1]
        for group in groups:
            inner = inner[group]
        inner[name] = value
    for said in run_on_ranks(disagree, 2, same, descriptions):
        for text, expected in zip(said, changes, strict=True):
            assert text.startswith(f"ranks disagree: {expected}")
            assert "start all ranks with the same arguments" in text


def test_the_code_that_is_compared_is_all_that_trains():
    """Wherever pipelines/ lies: in a checkout it is beside the library."""
    found = {(path.parent.name, path.name) for path in source_files()}
    assert {("plan", "order.py"), ("training", "trainer.py"), ("objectives", "loss.py")} <= found


def test_where_data_lie_may_differ_from_node_to_node():
    described = describe_rank(config_to_dict(tiny_config()), DATA)
    assert "train" not in described["data"]
    assert "flip_probability" in described["data"]


@pytest.mark.parametrize(
    ("every_steps", "found_after"), [(2, 4), pytest.param(1000, 6, marks=pytest.mark.slow)]
)
def test_a_weight_that_parts_from_the_other_rank_s_ends_the_run(images, every_steps, found_after):
    """At the next comparison; the last step has one in any case."""
    said = run_on_ranks(train_with_a_parted_weight, 2, images, every_steps)
    expected = f"weights differ between ranks after step {found_after}, in 1 parameter such as "
    assert said[0] == said[1]
    assert said[0].startswith(f"{expected}image_projection")
