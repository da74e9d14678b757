"""Is NVIDIA's apex really here? The only module that imports it, and only when asked.

The name alone says nothing: PyPI's `apex` is a web toolkit. So apex is told by its contents: its
optimizers and `amp_C`, the compiled extension that they call. `amp_C` is tried first, so that a
package that is another project is not even imported.
"""

from __future__ import annotations

from types import ModuleType

_HOW_TO_BUILD = (
    "build it from its source, with a CUDA compiler of the version that torch was built with: "
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "python -m pip install -v --no-build-isolation .  The package that PyPI has under this name is "
    "another project"
)


def load_apex_optimizers() -> ModuleType:
    """NVIDIA's `apex.optimizers`, with `FusedAdam` and `FusedLAMB`.

    Raises:
        ValueError: it is not installed, another project is, or it lacks its CUDA extensions.
    """
    try:
        import amp_C  # noqa: F401  apex itself notices its absence only when an optimizer is made
        from apex import optimizers

        for name in ("FusedAdam", "FusedLAMB"):
            getattr(optimizers, name)
    except Exception as error:  # a stranger's package may fail in any way
        raise ValueError(
            f"expected NVIDIA's apex with its CUDA extensions, but: {error!r}. Take another "
            f"optim.name (adamw, lamb), or {_HOW_TO_BUILD}"
        ) from error
    assert isinstance(optimizers, ModuleType)
    return optimizers
