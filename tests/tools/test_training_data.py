"""Packed data sets are checked against the tokenizer before a model sees their tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unicl_fast.shard_writer import DatasetWriter, PackedSample
from unicl_fast.shards import PackedDataset
from unicl_fast.tokenizer import Tokenizer
from unicl_fast.tools.training_data import check_tokenizer


@pytest.mark.parametrize("token", [49_405, 49_408])
def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    tokenizer = Tokenizer()
    with DatasetWriter(tmp_path / "set") as writer:
        writer.add(
            PackedSample(
                image=b"picture",
                extension="jpg",
                height=1,
                width=1,
                xxh3=0,
                captions=["x"],
                tokens=[np.array([49_406, token, 49_407], np.uint16)],
            )
        )
        writer.finish(
            tokenizer=tokenizer.name,
            vocabulary_hash=tokenizer.vocabulary_hash,
            context_length=77,
            class_names=[],
            templates=[],
            source=["here"],
            seed=0,
            tool_version="0",
        )
    with PackedDataset(tmp_path / "set") as dataset:
        if token < tokenizer.vocab_size:
            check_tokenizer(dataset, context_length=77)
        else:
            with pytest.raises(ValueError, match="token 49408 is beyond the vocabulary of 49408"):
                check_tokenizer(dataset, context_length=77)
