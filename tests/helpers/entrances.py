"""Files, texts and answers from others that ask for more than a machine has, and what reads them.

Each function makes one in an empty folder and reads it; a child runs it under limits.
"""

import base64
import contextlib
import functools
import itertools
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 1 << 20


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


# Tokenizers


def read_tokenizer(folder: Path, **changes: Any) -> None:
    from file_tokenizers import write_tokenizer

    from unicl_fast.text.file_tokenizer import FileTokenizer

    write_tokenizer(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    write_json(folder / "tokenizer.json", values | changes)
    FileTokenizer(str(folder), 16).encode(["a banana " * 1000] * 64)


def replaces(content: str, count: int, **pattern: str) -> dict[str, Any]:
    rule = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [rule] * count}


CHARS = base64.b64encode(struct.pack("<I", 8) + bytes(8) + b"x" * MB + b"\0").decode()
BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated"}
TEXT, OTHER = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
END = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
LONG = {
    "type": "TemplateProcessing",
    "single": [TEXT, *[{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 200_000],
    **{"pair": [TEXT], "special_tokens": {"</s>": END}},
}
DOUBLING = LONG | {"single": [TEXT] * 4, "pair": [TEXT, OTHER], "special_tokens": {}}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "growing_replaces": {"normalizer": replaces("a" * 100, 5, String="a")},
    "growing_expressions": {"normalizer": replaces("xx", 20, Regex="(?=.)")},
    "growing_map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARS}},
    "growing_decoder": {"decoder": replaces("a" * 1000, 1, String="a")["normalizers"][0]},
    "backtracking_split": {"pre_tokenizer": BACKTRACKING | {"invert": False}},
    "long_template": {"post_processor": LONG},
    "doubling_templates": {"post_processor": {"type": "Sequence", "processors": [DOUBLING] * 20}},
    "large_id": {"model": {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"}},
}
"""What each has of its own in tokenizer.json."""


# Weights, adapters and settings


def long_safetensors_header(folder: Path) -> None:
    from unicl_fast.checkpoints.load import read_shapes

    entry = '"%08d":{"dtype":"F32","shape":[],"data_offsets":[%d,%d]}'
    header = ",".join(entry % (n, 4 * n, 4 * n + 4) for n in range(1_300_000))
    data = f"{{{header}}}".encode()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(5_200_000))
    del header, data, entry
    read_shapes(folder / "a.safetensors")


def lying_safetensors_header(folder: Path) -> None:
    from unicl_fast.checkpoints.load import read_stored

    shape = {"w": {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 4]}}
    data = json.dumps(shape).encode()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(4))
    read_stored(folder / "a.safetensors")


def load_encoders_of(folder: Path, values: dict[str, Any]) -> None:
    from unicl_fast.conversion.initial import load_encoders

    write_json(folder / "config.json", values)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    load_encoders(folder)


def wide_model(folder: Path) -> None:
    tower = {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 1000}
    values = {"model_type": "clip", "projection_dim": 512}
    load_encoders_of(folder, values | {"text_config": tower, "vision_config": tower})


def long_model_type(folder: Path) -> None:
    load_encoders_of(folder, {"model_type": "x" * 30 * MB})


# Sources of packing


def pack(place: Path, **options: Any) -> None:
    from foreign_sources import read_source
    from pack_runs import jpeg

    from unicl_fast.packing.sources.list_options import ListOptions

    (place.parent / "a.jpg").write_bytes(jpeg(1))
    problems = [item.problem for item in read_source(place, ListOptions(**options)).items]
    if any(problems):
        raise ValueError("; ".join(one.message[:200] for one in problems if one is not None))


def zip_bomb(folder: Path) -> None:
    with (
        zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("cat/metadata.jsonl", "w", force_zip64=True) as file,
    ):
        for _ in range(1200):
            file.write(bytes(MB))
    pack(folder / "a.zip")


def long_caption(folder: Path) -> None:
    write_json(folder / "a.json", [{"image": "a.jpg", "caption": "x" * 60 * MB}])
    pack(folder / "a.json")


def long_field(folder: Path) -> None:
    (folder / "a.csv").write_text("image,caption\na.jpg," + "x" * 60 * MB)
    pack(folder / "a.csv")


# Servers and questions


def ask_server(read: Callable[[Any], Any], *, headers: dict[str, str], body_mb: int) -> None:
    from http_servers import Server
    from werkzeug.wrappers import Response

    from unicl_fast.dataset import object_store

    def answer(environ: Any, start_response: Any) -> Any:
        pieces = itertools.repeat(bytes(MB), body_mb)
        return Response(pieces, headers=headers)(environ, start_response)

    object_store.TRIES, object_store.FIRST_PAUSE_SECONDS = 2, 0.0
    with contextlib.closing(Server(answer)) as server:
        read(object_store.ObjectStore(f"{server.url}/folder"))


def endless_object(folder: Path) -> None:
    ask_server(lambda store: store.read("a", 0, 100), headers={}, body_mb=3000)


def endless_small_object(folder: Path) -> None:
    ask_server(lambda store: store.read_whole("manifest.json"), headers={}, body_mb=3000)


def long_headers(folder: Path) -> None:
    headers = {"ETag": "x" * 20 * MB, "Content-Length": str(10**15)}
    ask_server(lambda store: store.find("a"), headers=headers, body_mb=0)


def long_question(folder: Path) -> None:
    import msgspec

    from unicl_fast.evaluation.serving import SearchQuestion

    msgspec.json.decode(json.dumps({"text": "x" * 80 * MB}), type=SearchQuestion)


ENTRANCES: dict[str, str] = {
    "growing_replaces": "can make 10,000,000,000 characters of one",
    "growing_expressions": "characters of one",
    "growing_map": "characters of one|no tokenizer",
    "growing_decoder": "can make 1,000 characters of one",
    "backtracking_split": "the tokenizer failed .*retry-limit.* on an ordinary text",
    "long_template": "a row has 200,0.. tokens, and the context 16",
    "doubling_templates": "the tokenizer failed",
    "large_id": "its ids go up to 4,294,967,295",
    "long_safetensors_header": "lists its tensors in",
    "lying_safetensors_header": "is no safetensors file",
    "wide_model": "",
    "long_model_type": "",
    "zip_bomb": "",
    "long_caption": "captions of at most 100,000 are read",
    "long_field": "captions of at most 100,000 are read",
    "endless_object": "were requested",
    "endless_small_object": "is too large",
    "long_headers": "could not be asked for its size",
    "long_question": "Expected `str` of length <= 100000",
}
"""The refusal at each entrance, by its name: one of TOKENIZERS or a function above."""


def enter(task: tuple[str, str]) -> str:
    """In the child: the refusal, "" for none."""
    name, folder = task
    read = globals().get(name) or functools.partial(read_tokenizer, **TOKENIZERS[name])
    try:
        read(Path(folder))
    except (ValueError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
