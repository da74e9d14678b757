"""Does what an install without extras must do; run by a test, and by CI in such an install.

A model is trained from a list of batches, loaded, used, and converted. The argument is a folder.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

ABSENT = ("nvidia.dali", "matplotlib", "tensorboard", "starlette", "sklearn", "faiss")
ABSENT += ("apex", "amp_C", "triton", "peft")
sys.modules.update(dict.fromkeys(ABSENT))  # any import of them fails, where they are installed too

import torch  # noqa: E402
from small_runs import tiny_config  # noqa: E402

import unicl_fast  # noqa: E402
from unicl_fast import Tokenizer, UniCL, load_model  # noqa: E402
from unicl_fast.batch import ListLoader  # noqa: E402
from unicl_fast.objectives.targets import collate  # noqa: E402
from unicl_fast.training.assembly import make_trainer  # noqa: E402

NEED_EXTRAS = (".loss_triton", ".window_attention", ".parquet_rows", ".serving")
"""Modules that are imported where triton, pyarrow and Starlette are there."""


def main(folder: Path) -> None:
    """Raises where something is missing, or is imported that only some functions need."""
    (library,) = unicl_fast.__path__[:1]
    rooms = {one.name for one in pkgutil.iter_modules([library]) if one.ispkg}
    for room in rooms - {"pipelines", "tools"}:  # which need more, and are here if installed
        package = importlib.import_module(f"unicl_fast.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(NEED_EXTRAS):
                importlib.import_module(module.name)
    assert not {"open_clip", "jinja2", "ftfy", "onnx"} & sys.modules.keys()
    importlib.import_module("unicl_fast.pipelines.feature_loader")
    said = ""
    try:
        importlib.import_module("unicl_fast.pipelines.train_loader")
    except ModuleNotFoundError as error:
        said = str(error)
    assert "[cuda12]" in said, said or "imported without DALI"
    texts = Tokenizer()(["a red square", "a blue square", "a dog"] * 4)
    images = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8)
    batches = [collate(images, texts, torch.full((12,), -1))]
    config = tiny_config(precision="fp32", steps=3)
    config = config.changed(run={"trackers": ()})
    run_folder = folder / "run"
    make_trainer(config, ListLoader(batches), run_folder=run_folder, progress=False).fit()
    model = load_model(run_folder)
    assert isinstance(model.encoders, UniCL)
    assert len(model.classify([images[0].numpy()], ["square", "dog"])[0]) == 2
    from unicl_fast.tools.convert import __main__ as convert

    convert.main(["timm", str(run_folder), str(folder / "timm")])
    assert (folder / "timm" / "model.safetensors").is_file()
    assert unicl_fast.unified_contrastive_loss


if __name__ == "__main__":
    main(Path(sys.argv[1]))
