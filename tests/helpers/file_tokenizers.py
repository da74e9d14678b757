"""A small tokenizer of SigLIP's family in a folder, as it is published."""

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


def write_bert_tokenizer(folder: Path, kind: str) -> None:
    """Pieces of words as BERT's (padding is 0) or as XLM-R's (1), with its start and end."""
    is_bert = kind in ("bert", "distilbert")
    start, end, unknown = ("[CLS]", "[SEP]", "[UNK]") if is_bert else ("<s>", "</s>", "<unk>")
    pad = "[PAD]" if is_bert else PAD
    tokenizer: Tokenizer
    trainer: trainers.Trainer
    if is_bert:
        special = [pad, unknown, start, end]
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    else:
        special = [start, pad, end, unknown]
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token=unknown, show_progress=False
        )
    tokenizer.train_from_iterator(CAPTIONS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(one, special.index(one)) for one in (start, end)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "unk_token": unknown}
    values |= {"model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
