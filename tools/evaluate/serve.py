"""`unicl-eval serve`."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from .command import ModelCommand


@dataclass(frozen=True, kw_only=True)
class Serve(ModelCommand):
    """Opens a page on this machine: search of a data set, and images tried against typed classes.

    Nothing leaves this machine, and only this machine can reach the page.
    """

    data: str = ""
    """Images to search, as in search; without it the page has no search."""
    features: str = "auto"
    """Folder that keeps their features, as in linear-probe."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """Port of the page; 0 picks a free one."""
    classes: tuple[str, ...] = ()
    """Classes that the page starts with: by default the data's, or a few animals."""

    def check(self) -> None:
        from unicl_fast.evaluation.data import check_data

        super().check()
        if self.data:
            check_data(self.data)

    def run(self) -> None:
        """Serves until Ctrl-C. Raises OSError if the port is in use."""
        from unicl_fast.evaluation.features import ModelOnRanks
        from unicl_fast.evaluation.inference import load_model
        from unicl_fast.evaluation.search import open_index
        from unicl_fast.evaluation.serving import MOST_CLASSES, Server
        from unicl_fast.system.line import line

        with contextlib.ExitStack() as stack:
            with line(f"loading {self.checkpoint}"):
                model = load_model(self.checkpoint, weights=self.weights, device=self.device)
            index = None
            if self.data:
                folder = self.features_folder(self.features)
                on_ranks = dataclasses.replace(ModelOnRanks.of(model), progress=True)
                index = stack.enter_context(open_index(on_ranks, self.data, folder=folder))
            named = () if index is None else index.dataset.manifest.class_names
            classes = self.classes or tuple(dict.fromkeys(named))[:MOST_CLASSES]
            classes = classes if len(classes) > 1 else ("cat", "dog", "bird")
            model.require_classes(classes)
            name = str(self.checkpoint)
            try:
                server = Server(model, name=name, classes=classes, port=self.port, index=index)
            except OSError as error:
                said = f"port {self.port}: {error.strerror}; --port 0 picks a free one"
                raise OSError(said) from None
            with server:
                print(f"{server.address} (Ctrl-C ends it)", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    server.serve_forever()
                print()
