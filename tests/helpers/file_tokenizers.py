"""A small tokenizer of SigLIP's family in a folder, as it is published."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, END = "<pad>", "</s>"
CAPTIONS = [
    "a photo of a dog", "two people in the snow", "a cat sits on a red sofa, far away",
    "an airplane and an automobile", "a bird, a deer, a frog, a horse, a ship and a truck",
]  # fmt: skip


def write_tokenizer(folder: Path, *, size: int = 120, pad: str = END, unused: int = 0) -> Path:
    """Pieces of words, an end token, and padding with it, or with <pad> (0).

    The pieces come after `unused` other ones, so that their ids are large.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [PAD, END, "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    others = [[f"\u27e8{number}\u27e9", -30.0] for number in range(unused)]
    content["model"]["vocab"][len(special) : len(special)] = others
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{"pad_token": pad, "eos_token": END, "unk_token": "<unk>", "model_max_length": 16},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder
