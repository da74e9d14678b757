"""German and Japanese titles, from packing to search, by a text encoder of many languages."""

import csv
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from drawings import draw
from inline_checks import check_inline
from pack_runs import build_set
from program_runs import SMALL, call, losses
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from unicl_fast import load_model
from unicl_fast.evaluation.search import open_index
from unicl_fast.evaluation.words import Words
from unicl_fast.tools import pretrain

TITLES = (
    "Kleiderschrank aus Eiche", "Bürostuhl mit Rollen", "Esstisch für sechs Personen",
    "Glastür", "Große Straßenlaterne", "Müllsack", "赤い三人掛けソファ", "木製の机",
    "ガラスのテーブル", "カラスの置物", "白い食器棚", "ﾃﾞｽｸﾗｲﾄ", "电脑桌", "빨간 책",
)  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "vocab_size": 400, "max_position_embeddings": 40}


def write_encoder(folder: Path) -> Path:
    """Random weights, and a Unigram tokenizer of the titles with XLM-RoBERTa's NFKC and tokens.

    The small published encoders of many languages are BERTs with that tokenizer.
    """
    tokenizer: Any = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    words = {"vocab_size": 400, "special_tokens": ["<s>", "<pad>", "</s>", "<unk>"]}
    trainer = trainers.UnigramTrainer(**words, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TITLES * 20, trainer)
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    return folder


@pytest.mark.parametrize(
    ("query", "found"),
    [
        *(("schrank", 0), ("Stuhl", 1), ("TISCH", 2), ("Tür", 3), ("buerostuhl", 1)),
        *(("Strassenlaterne", 4), ("MÜLL", 5), (unicodedata.normalize("NFD", "Tür"), 3)),
        *(("ソファ", 6), ("赤いソファ", 6), ("机", 7), ("木の机", 7), ("ガラス", 8), ("カラス", 9)),
        *(("棚", 10), ("デスクライト", 11), ("ﾃﾞｽｸ", 11), ("桌", 12), ("책", 13)),
    ],
)
def test_a_word_or_a_part_of_one_finds_its_title(query, found):
    scores = Words(TITLES).scores(query)
    assert int(scores.argmax()) == found
    assert scores[found] > 0
    others = [unicodedata.normalize("NFD", one) for one in TITLES]  # as a Mac writes file names
    assert Words(others).scores(query).tolist() == scores.tolist()


@pytest.mark.slow
@pytest.mark.dali
def test_titles_are_packed_trained_on_by_heads_and_searched(tmp_path, monkeypatch):
    check_inline(monkeypatch)
    forms = ("NFC", "NFD", "NFKC")
    with (tmp_path / "list.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "title"])
        for number in range(3 * len(TITLES)):
            (tmp_path / f"{number}.png").write_bytes(draw(number, side=32)[0])
            title = TITLES[number % len(TITLES)]
            rows.writerow([f"{number}.png", unicodedata.normalize(forms[number % 3], title)])
    packed, run = tmp_path / "packed", tmp_path / "run"
    build_set([tmp_path / "list.csv"], packed, caption_column="title")
    encoder = write_encoder(tmp_path / "encoder")
    call(
        *(pretrain, *SMALL, "--data.train", packed, "--init-text", encoder, "--out", run),
        *("--optim.freeze", "image", "text", "--efficiency.stored-features", tmp_path / "stored"),
        *("--data.crop-scale", "1", "1", "--data.crop-ratio", "1", "1", "--optim.lr", "0.01"),
        *("--data.flip-probability", "0", "--model.standardise", "--run.trackers"),
        *("--run.steps", "60", "--model.text-width", "32"),
    )
    assert min(losses(run)) < losses(run)[0] - 0.5
    model = load_model(run)
    same = model.embed_texts([unicodedata.normalize(one, TITLES[1]) for one in forms])
    torch.testing.assert_close(torch.tensor(same[1:]), torch.tensor(same[:1]).expand(2, -1))
    with open_index(model, packed) as index:
        for query, title in (("Stuhl", 1), ("ソファ", 6), ("机", 7), ("デスクライト", 11)):
            (found,) = index.by_texts([query], top=3, by=["words"])
            captions = [TITLES[title], *(one.caption for one in found)]
            assert len({unicodedata.normalize("NFKC", one) for one in captions}) == 1
            assert len(index.by_texts([query], top=3)[0]) == 3  # with images and titles
